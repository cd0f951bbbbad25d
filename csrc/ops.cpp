// Table of contents of the native extension: the op schemas, and the Python module.
// Kernels: cpu/<op>.cpp and cuda/<op>.cu. Fake implementations and autograd live in Python.
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "cpu/bf16.h"
#include "cpu/simd.h"

#define FASTCL_PAIRS "Tensor a, Tensor? b, Tensor scale"
#define FASTCL_IDS "Tensor? ids_a=None, Tensor? ids_b=None, str same='keep'"

TORCH_LIBRARY(fastcl, m) {
  m.def("normalize_pair(Tensor x1, Tensor x2, bool normalize) -> (Tensor, Tensor, Tensor)");
  m.def("unit_rows(Tensor x, ScalarType? rounded) -> (Tensor, Tensor)");
  m.def(
      "unit_rows_backward(Tensor z, Tensor rnorm, Tensor dz, ScalarType dtype) -> Tensor");
  m.def(
      "lse_forward(" FASTCL_PAIRS ", float bound, SymInt offset, SymInt pair, *, " FASTCL_IDS
      ", Tensor? bias=None, bool columns=False) -> Tensor[]");
  m.def(
      "lse_backward(" FASTCL_PAIRS ", float bound, SymInt offset, SymInt pair, "
      "Tensor lse_a, Tensor? lse_b, Tensor? w_a, Tensor? w_b, *, " FASTCL_IDS
      ", Tensor? bias=None, Tensor? pull_a=None, Tensor? pull_b=None, bool columns=False) "
      "-> Tensor[]");
  m.def(
      "pair_loss(Tensor pos, Tensor lse, Tensor scale, float weight, float? pull, "
      "bool positive_counts, SymInt? divisor, ScalarType dtype) -> (Tensor, Tensor, Tensor)");
  m.def(
      "pair_backward(Tensor z, Tensor rnorm, Tensor grad_lse, Tensor pos, Tensor share, "
      "Tensor scale, Tensor grad, Tensor? w, float weight, float? pull, SymInt divisor, "
      "ScalarType dtype) -> (Tensor, Tensor, Tensor)");
  m.def("softplus_forward(" FASTCL_PAIRS
        ", Tensor beta, float sign, SymInt offset, *, " FASTCL_IDS ") -> (Tensor, Tensor)");
  m.def("softplus_backward(" FASTCL_PAIRS ", float sign, SymInt offset, "
        "Tensor? beta_a, Tensor? beta_b, Tensor? w_a, Tensor? w_b, *, " FASTCL_IDS ") -> Tensor");
  m.def("softplus_both(Tensor a, Tensor b, Tensor scale, Tensor beta, float sign, SymInt offset, "
        "Tensor? w=None, *, " FASTCL_IDS ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("similarity_stats(" FASTCL_PAIRS
        ", SymInt offset, SymInt pair) -> (Tensor, Tensor, Tensor)");
  m.def("segmented_sort(Tensor x, bool descending) -> (Tensor, Tensor)");
  m.def("wasserstein_1d(Tensor x, Tensor y, bool per_row) -> (Tensor, Tensor)");
}

#ifdef FASTCL_CUDA
namespace fastcl {
void bind_cuda(pybind11::module_& m);  // cuda/bindings.cpp
}
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["simd"] = fastcl::cpu::simd_level();
  info["bf16"] = fastcl::cpu::bf16_supported();
#ifdef FASTCL_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

std::string use_simd(const std::string& name) {
  const std::string previous = fastcl::cpu::simd_level();
  if (!fastcl::cpu::use_simd(name.c_str())) {
    throw pybind11::value_error("_use_simd: name must be a level of this processor, got " + name);
  }
  return previous;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Compiled kernels of fastcl; importing it registers torch.ops.fastcl.*";
  m.def("build_info", &build_info,
        "Compiler, torch and C++ versions of this build, and the instruction set in use.");
  m.def("_use_simd", &use_simd,
        "For tests, and not while an op runs: makes the C++ ops use the instruction set of this "
        "name (baseline, avx2, avx512). Returns the one before. ValueError where the processor "
        "lacks it.");
#ifdef FASTCL_CUDA
  fastcl::bind_cuda(m);
#endif
}
