// Compares the CUDA kernels with plain loops on the CPU, without torch. On a machine with a GPU, in its root:
//   nvcc -std=c++17 -O2 -arch=native -o selftest tests/cuda_selftest.cu csrc/cuda/*.cu
//   ./selftest && compute-sanitizer ./selftest 1100 && compute-sanitizer --tool racecheck ./selftest 1100
// The arguments are the longest row, 50,000 without one, and the shortest. Results must equal the reference to the bit,
// or to the rounding of the output.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "../csrc/cuda/launch.h"

using fastcl::cuda::Dtype;

namespace {

int failures = 0, checks = 0;

void check(bool ok, const char* what, const char* pattern, int64_t m, int64_t k) {
  ++checks;
  if (!ok && ++failures <= 20) {
    std::printf("FAILED: %s, %s, sizes %lld and %lld\n", what, pattern, static_cast<long long>(m),
                static_cast<long long>(k));
  }
}

void require(int error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(static_cast<cudaError_t>(error)));
  std::exit(2);
}

// Device memory with guard elements behind it, which nothing may write.
template <typename T>
class Device {
 public:
  explicit Device(const std::vector<T>& host) : size_(host.size()) {
    std::vector<T> all(host);
    all.resize(size_ + kGuard);
    std::memset(static_cast<void*>(all.data() + size_), 0x5A, kGuard * sizeof(T));
    require(cudaMalloc(reinterpret_cast<void**>(&data_), all.size() * sizeof(T)));
    require(cudaMemcpy(data_, all.data(), all.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  explicit Device(size_t size) : Device(std::vector<T>(size)) {}
  Device(const Device&) = delete;
  ~Device() { cudaFree(data_); }

  T* data() { return data_; }

  std::vector<T> host(const char* pattern) {
    std::vector<T> all(size_ + kGuard);
    require(cudaDeviceSynchronize());
    require(cudaMemcpy(all.data(), data_, all.size() * sizeof(T), cudaMemcpyDeviceToHost));
    const auto* guard = reinterpret_cast<const unsigned char*>(all.data() + size_);
    check(std::all_of(guard, guard + kGuard * sizeof(T), [](unsigned char c) { return c == 0x5A; }), "writes behind",
          pattern, static_cast<int64_t>(size_), 0);
    all.resize(size_);
    return all;
  }

 private:
  static constexpr size_t kGuard = 64;
  size_t size_;
  T* data_ = nullptr;
};

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The number that bits of a type stand for, by its definition.
double number(uint32_t bits, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return float_of(bits);
  if (dtype == Dtype::kBFloat16) return float_of(bits << 16);
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  double value = exponent == 31  ? (mantissa ? std::nan("") : std::numeric_limits<double>::infinity())
                 : exponent == 0 ? std::ldexp(mantissa, -24)
                                 : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -value : value;
}

const char* const kPatterns[] = {"normal", "few values", "equal", "ascending", "descending", "specials", "random bits"};

// Float bits; for the 16-bit types their upper half, which is a bfloat16 and as good a float16.
uint32_t sample(const char* pattern, int64_t i, std::mt19937& random) {
  static const uint32_t specials[] = {0,          0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000,
                                      0xFFC00000, 0x7F80FFFF, 0xFFFFFFFF, 0x00010000, 0x80010000,
                                      0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0xBF800000, 0x7C000000,
                                      0xFC000000, 0x7C010000, 0xFC010000, 0x7E000000, 0xFE000000};
  switch (pattern[0] + pattern[1]) {
    case 'n' + 'o':
      return bits_of(std::normal_distribution<float>()(random));
    case 'f' + 'e':
      return bits_of(static_cast<float>(random() % 5) - 2);
    case 'e' + 'q':
      return bits_of(1.5f);
    case 'a' + 's':
      return bits_of(0.25f * static_cast<float>(i) - 100);
    case 'd' + 'e':
      return bits_of(100 - 0.25f * static_cast<float>(i));
    case 's' + 'p':
      return specials[random() % 20];
    default:
      return static_cast<uint32_t>(random());
  }
}

template <typename Bits>
void test_sort(Dtype dtype, const char* pattern, int64_t segments, int64_t n, bool descending) {
  std::mt19937 random(static_cast<unsigned>(n));
  std::vector<Bits> x(segments * n);
  for (size_t i = 0; i < x.size(); ++i) {
    x[i] = static_cast<Bits>(sample(pattern, static_cast<int64_t>(i), random) >> (32 - 8 * sizeof(Bits)));
  }
  size_t bytes = 0;
  require(fastcl::cuda::segmented_sort_scratch(segments, n, &bytes));
  Device<Bits> d_x(x), d_values(x.size());
  Device<int32_t> d_indices(x.size());
  Device<unsigned char> scratch(bytes);
  require(fastcl::cuda::segmented_sort(d_x.data(), d_values.data(), d_indices.data(), segments, n, dtype, descending,
                                       scratch.data(), nullptr));
  const std::vector<Bits> values = d_values.host(pattern);
  const std::vector<int32_t> indices = d_indices.host(pattern);
  scratch.host(pattern);
  std::vector<int32_t> order(n);
  bool ok = true;
  for (int64_t s = 0; s < segments; ++s) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      double left = number(x[s * n + a], dtype), right = number(x[s * n + b], dtype);
      if (descending) std::swap(left, right);
      return std::isnan(right) ? !std::isnan(left) : left < right;
    });
    for (int64_t i = 0; i < n; ++i) {
      ok = ok && indices[s * n + i] == order[i] && values[s * n + i] == x[s * n + order[i]];
    }
  }
  check(ok, descending ? "descending sort" : "ascending sort", pattern, segments, n);
}

struct Plan {
  std::vector<double> grad, term;
  double cost = 0;
};

// One row pair by its definition, cell against cell.
Plan plan_of(const float* x, const float* y, int64_t m, int64_t k) {
  const auto less = [](float a, float b) { return std::isnan(b) ? !std::isnan(a) : a < b; };
  std::vector<int64_t> order(m);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return less(x[a], x[b]); });
  std::vector<float> sorted(y, y + k);
  std::stable_sort(sorted.begin(), sorted.end(), less);
  Plan plan{std::vector<double>(m), std::vector<double>(m)};
  for (int64_t r = 0, j = 0; r < m; ++r) {
    const int64_t begin = r * k, end = begin + k;
    long double term = 0, grad = 0;
    for (; j < k && j * m < end; ++j) {
      const int64_t overlap = std::min(end, (j + 1) * m) - std::max(begin, j * m);
      const long double d = static_cast<long double>(x[order[r]]) - sorted[j];
      term += overlap * d * d, grad += 2 * overlap * d;
      if ((j + 1) * m > end) break;
    }
    const long double unit = static_cast<long double>(m) * k;
    plan.term[order[r]] = static_cast<double>(term / unit), plan.grad[order[r]] = static_cast<double>(grad / unit);
    plan.cost += static_cast<double>(term / unit);
  }
  return plan;
}

// The kernels add in double; `slack` is how far its roundings may carry, `scale` what cancelled.
template <typename T>
bool close(T got, double expected, double slack, double scale) {
  if (std::isnan(expected)) return std::isnan(got);
  const T rounded = static_cast<T>(expected);
  if (std::isinf(rounded)) return got == rounded;
  const double step = std::is_same_v<T, float> ? std::max(std::abs(expected) * 0x1p-23, 0x1p-149) : 0;
  return std::abs(static_cast<double>(got) - expected) <= step + slack * scale;
}

void test_wasserstein(const char* pattern, int64_t p, int64_t m, int64_t k, bool per_row) {
  std::mt19937 random(static_cast<unsigned>(m + 7 * k));
  std::vector<float> x(p * m), y(p * k);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float_of(sample(pattern, static_cast<int64_t>(i), random));
  for (size_t i = 0; i < y.size(); ++i) y[i] = float_of(sample(pattern, static_cast<int64_t>(i), random));
  // A row pair with the same numbers in another order.
  if (m == k) std::reverse_copy(x.begin(), x.begin() + m, y.begin());
  size_t bytes = 0;
  require(fastcl::cuda::wasserstein_1d_scratch(p, m, k, &bytes));
  Device<float> d_x(x), d_y(y), d_grad(p * m), d_terms(per_row ? p * m : 0);
  Device<double> d_cost(per_row ? 0 : p);
  Device<unsigned char> scratch(bytes);
  const auto run = [&] {
    require(fastcl::cuda::wasserstein_1d(d_x.data(), d_y.data(),
                                         per_row ? static_cast<void*>(d_terms.data()) : d_cost.data(), d_grad.data(), p,
                                         m, k, per_row, scratch.data(), nullptr));
  };
  run();
  const auto grad = d_grad.host(pattern), terms = d_terms.host(pattern);
  const auto cost = d_cost.host(pattern);
  scratch.host(pattern);
  bool ok = true;
  for (int64_t row = 0; row < p; ++row) {
    const Plan plan = plan_of(&x[row * m], &y[row * k], m, k);
    double largest = 0;
    for (int64_t i = 0; i < m; ++i) {
      if (std::isfinite(x[row * m + i])) largest = std::max(largest, std::abs(static_cast<double>(x[row * m + i])));
    }
    for (int64_t j = 0; j < k; ++j) {
      if (std::isfinite(y[row * k + j])) largest = std::max(largest, std::abs(static_cast<double>(y[row * k + j])));
    }
    const double slack = static_cast<double>(m + k) * 0x1p-52 / static_cast<double>(m);
    for (int64_t i = 0; i < m; ++i) {
      ok = ok && close(grad[row * m + i], plan.grad[i], slack, largest);
      if (per_row) ok = ok && close(terms[row * m + i], plan.term[i], slack, plan.term[i]);
    }
    if (!per_row) ok = ok && close(cost[row], plan.cost, slack * static_cast<double>(m), plan.cost);
    const bool finite = std::all_of(&x[0], &x[0] + m, [](float v) { return std::isfinite(v); });
    if (row == 0 && m == k && finite) check(per_row ? terms[0] == 0 : cost[0] == 0, "zero distance", pattern, m, k);
  }
  check(ok, per_row ? "costs of elements" : "costs of rows", pattern, m, k);
  run();
  const auto again = d_grad.host(pattern);
  const auto cost_again = d_cost.host(pattern);
  check(std::memcmp(grad.data(), again.data(), grad.size() * 4) == 0 &&
            (cost.empty() || std::memcmp(cost.data(), cost_again.data(), cost.size() * 8) == 0),
        "same bits twice", pattern, m, k);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t longest = argc > 1 ? std::atoll(argv[1]) : 50000;
  const int64_t shortest = argc > 2 ? std::atoll(argv[2]) : 1;
  const int64_t sizes[] = {1,    2,    31,   32,   33,   100,   511,   512,   513,   1000, 1024,
                           1025, 1100, 2049, 5000, 8192, 16383, 16384, 16385, 20000, 50000};
  for (const int64_t n : sizes) {
    if (n > longest || n < shortest) continue;
    const int64_t rows = n < 600 ? 3 : 2;
    for (const char* pattern : kPatterns) {
      for (const bool flag : {false, true}) {
        test_sort<uint32_t>(Dtype::kFloat32, pattern, rows, n, flag);
        test_sort<uint16_t>(Dtype::kFloat16, pattern, rows, n, flag);
        test_sort<uint16_t>(Dtype::kBFloat16, pattern, rows, n, flag);
        for (const int64_t k : {n, n + 1, (n + 2) / 3, 3 * n, int64_t{1}, int64_t{700}}) {
          if (k <= longest) test_wasserstein(pattern, rows, n, k, flag);
        }
      }
    }
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures != 0;
}
