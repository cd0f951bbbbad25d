// Python functions of the CUDA launchers. Tensors come as addresses and a stream as an integer, so
// that nothing here needs torch's CUDA headers; fastcl/kernels/sort.py allocates and calls.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace fastcl::cuda {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* op, int error) {
  if (error == cudaSuccess) return;
  const char* const reason = cudaGetErrorString(static_cast<cudaError_t>(error));
  throw std::runtime_error(std::string(op) + ": CUDA error: " + reason);
}

size_t sort_scratch(int64_t segments, int64_t n) {
  size_t bytes = 0;
  check("segmented_sort", segmented_sort_scratch(segments, n, &bytes));
  return bytes;
}

void sort(uintptr_t x, uintptr_t values, uintptr_t indices, int64_t segments, int64_t n,
          Dtype dtype, bool descending, uintptr_t scratch, uintptr_t stream) {
  check("segmented_sort",
        segmented_sort(pointer<void>(x), pointer<void>(values), pointer<int32_t>(indices), segments,
                       n, dtype, descending, pointer<void>(scratch), pointer<void>(stream)));
}

size_t wasserstein_scratch(int64_t p, int64_t m, int64_t k) {
  size_t bytes = 0;
  check("wasserstein_1d", wasserstein_1d_scratch(p, m, k, &bytes));
  return bytes;
}

void wasserstein(uintptr_t x, uintptr_t y, uintptr_t cost, uintptr_t grad, int64_t p, int64_t m,
                 int64_t k, bool per_row, uintptr_t scratch, uintptr_t stream) {
  check("wasserstein_1d", wasserstein_1d(pointer<float>(x), pointer<float>(y), pointer<void>(cost),
                                         pointer<float>(grad), p, m, k, per_row,
                                         pointer<void>(scratch), pointer<void>(stream)));
}

}  // namespace
}  // namespace fastcl::cuda

namespace fastcl {

// A launch waits where the device's queue is full, so none holds the interpreter lock.
void bind_cuda(pybind11::module_& m) {
  namespace py = pybind11;
  using cuda::Dtype;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::enum_<Dtype>(m, "CudaDtype")
      .value("float32", Dtype::kFloat32)
      .value("float16", Dtype::kFloat16)
      .value("bfloat16", Dtype::kBFloat16);
  m.def("cuda_segmented_sort_scratch", &cuda::sort_scratch, Unlocked(),
        "Bytes of scratch, most often 0.");
  m.def("cuda_segmented_sort", &cuda::sort, Unlocked(), "See csrc/cuda/launch.h.");
  m.def("cuda_wasserstein_1d_scratch", &cuda::wasserstein_scratch, Unlocked(),
        "Bytes of scratch, most often 0.");
  m.def("cuda_wasserstein_1d", &cuda::wasserstein, Unlocked(), "See csrc/cuda/launch.h.");
}

}  // namespace fastcl
