// The loops behind simd.h, written once with compiler vector types. The including file chooses
// FASTCL_SIMD_NAMESPACE, FASTCL_SIMD_BYTES and, for more than the baseline, FASTCL_SIMD_TARGET.
// Nothing of the standard library may be included below the target pragma (see simd.h).
#include "simd.h"

#ifdef FASTCL_SIMD_TARGET
#define FASTCL_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define FASTCL_PUSH_TARGET(isa) \
  FASTCL_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#else
#define FASTCL_PUSH_TARGET(isa) FASTCL_PRAGMA(GCC target(isa))
#endif
FASTCL_PUSH_TARGET(FASTCL_SIMD_TARGET)
#endif

#define FASTCL_INLINE static inline __attribute__((always_inline))

namespace fastcl::cpu::FASTCL_SIMD_NAMESPACE {
namespace {

// Column sums of this many rows are kept in T before they join the double totals.
constexpr int64_t kStripRows = 32;
constexpr double kLog2E = 1.4426950408889634074;

template <typename T>
struct Float;

// exp2_coefficients: weighted minimax fit of 2^f on [-1/2, 1/2], relative error 2.6e-9 (float) and
// 1.8e-17 (double), below the rounding of the evaluation.
template <>
struct Float<float> {
  typedef float V __attribute__((vector_size(FASTCL_SIMD_BYTES)));
  typedef uint32_t U __attribute__((vector_size(FASTCL_SIMD_BYTES)));
  static constexpr int kMantissa = 23;
  static constexpr uint32_t kBias = 127;
  static constexpr float kRound = 0x1.8p23f;
  static constexpr float kMinExponent = -126.f;
  static constexpr int kDegree = 6;
  static constexpr float kExp2[kDegree + 1] = {
      1.f,
      0.69314721496802789f,
      0.24022652782887737f,
      0.05550310551013797f,
      0.00961769297297306f,
      0.00134066439023518f,
      0.00015594678161327f,
  };
};

template <>
struct Float<double> {
  typedef double V __attribute__((vector_size(FASTCL_SIMD_BYTES)));
  typedef uint64_t U __attribute__((vector_size(FASTCL_SIMD_BYTES)));
  static constexpr int kMantissa = 52;
  static constexpr uint64_t kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kMinExponent = -1022.;
  static constexpr int kDegree = 11;
  static constexpr double kExp2[kDegree + 1] = {
      1.,
      0.69314718055994569675,
      0.24022650695910098007,
      0.055504108664790394552,
      0.0096181291076070023796,
      0.0013333558153439964747,
      0.0001540353044157213033,
      0.000015252727385193868197,
      1.3215442675329822143e-6,
      1.0180647659234138888e-7,
      7.0725704128144235096e-9,
      4.078071929588336665e-10,
  };
};

template <typename T>
using Vec = typename Float<T>::V;
template <typename T>
using Bits = typename Float<T>::U;
template <typename T>
constexpr int64_t kLanes = FASTCL_SIMD_BYTES / sizeof(T);

template <typename T>
FASTCL_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
FASTCL_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename T>
FASTCL_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <typename T>
FASTCL_INLINE T horizontal_sum(Vec<T> v) {
  T lane[kLanes<T>];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int64_t width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int64_t k = 0; k < width; ++k) lane[k] += lane[k + width];
  }
  return lane[0];
}

// 2^t for t below the largest exponent. Results under the normal range are 0; NaN stays NaN.
template <typename T>
FASTCL_INLINE Vec<T> exp2(Vec<T> t) {
  using F = Float<T>;
  // Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits.
  const Vec<T> rounded = t + F::kRound;
  const Vec<T> f = t - (rounded - F::kRound);
  Vec<T> p = splat<T>(F::kExp2[F::kDegree]);
#pragma GCC unroll 16
  for (int k = F::kDegree - 1; k >= 0; --k) p = p * f + F::kExp2[k];
  Bits<T> bits;
  __builtin_memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits + F::kBias) << F::kMantissa;
  Vec<T> power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  p *= power;
  // Bitwise, so that -inf gives 0 although its polynomial is NaN, and NaN is not hidden.
  const auto flush = t < F::kMinExponent;
  Bits<T> keep, result;
  __builtin_memcpy(&keep, &flush, sizeof(keep));
  __builtin_memcpy(&result, &p, sizeof(result));
  result &= ~keep;
  __builtin_memcpy(&p, &result, sizeof(p));
  return p;
}

// e^y; the product with log2(e) is rounded, which is harmless for the small |y| whose e^y matters.
template <typename T>
FASTCL_INLINE Vec<T> exp(Vec<T> y) {
  return exp2<T>(y * static_cast<T>(kLog2E));
}

template <typename T, bool kColumns>
FASTCL_INLINE void exp2_sums_impl(const Tile<T>& s, T c, T shift, double* row_sum,
                                  double* col_sum) {
  alignas(64) T strip[kMaxTileCols];
  for (int64_t first = 0; first < s.rows; first += kStripRows) {
    const int64_t last = first + kStripRows < s.rows ? first + kStripRows : s.rows;
    if (kColumns) __builtin_memset(strip, 0, sizeof(strip));
    for (int64_t i = first; i < last; ++i) {
      const T* row = s.data + i * s.ld;
      Vec<T> sum{};
      for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
        const Vec<T> e = exp2<T>(load(row + j) * c - shift);
        sum += e;
        if (kColumns) store(strip + j, load(strip + j) + e);
      }
      row_sum[i] += horizontal_sum<T>(sum);
    }
    if (kColumns) {
      for (int64_t j = 0; j < s.cols; ++j) col_sum[j] += strip[j];
    }
  }
}

template <typename T>
void exp2_sums(Tile<T> s, T c, T shift, double* row_sum, double* col_sum) {
  if (col_sum != nullptr) {
    exp2_sums_impl<T, true>(s, c, shift, row_sum, col_sum);
  } else {
    exp2_sums_impl<T, false>(s, c, shift, row_sum, col_sum);
  }
}

template <typename T>
void maxima(Tile<T> s, T* row_max, T* col_max) {
  alignas(64) T best_col[kMaxTileCols];
  for (int64_t j = 0; j < kMaxTileCols; ++j) best_col[j] = -__builtin_inf();
  for (int64_t i = 0; i < s.rows; ++i) {
    const T* row = s.data + i * s.ld;
    Vec<T> best = splat<T>(-__builtin_inf());
    for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
      const Vec<T> x = load(row + j);
      const Vec<T> col = load(best_col + j);
      best = x > best ? x : best;
      store(best_col + j, x > col ? x : col);
    }
    T m = best[0];
    for (int64_t k = 1; k < kLanes<T>; ++k) m = best[k] > m ? best[k] : m;
    row_max[i] = m;
  }
  if (col_max != nullptr) {
    for (int64_t j = 0; j < s.cols; ++j) col_max[j] = best_col[j];
  }
}

template <typename T>
void exp_row_sums(Tile<T> s, const T* row_shift, double* row_sum) {
  for (int64_t i = 0; i < s.rows; ++i) {
    const T* row = s.data + i * s.ld;
    Vec<T> sum{};
    for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
      sum += exp<T>(load(row + j) - row_shift[i]);
    }
    row_sum[i] += horizontal_sum<T>(sum);
  }
}

template <typename T>
void exp_col_sums(Tile<T> s, const T* col_shift, double* col_sum) {
  alignas(64) T shift[kMaxTileCols];
  alignas(64) T strip[kMaxTileCols];
  for (int64_t j = 0; j < kMaxTileCols; ++j) shift[j] = j < s.cols ? col_shift[j] : T(0);
  for (int64_t first = 0; first < s.rows; first += kStripRows) {
    const int64_t last = first + kStripRows < s.rows ? first + kStripRows : s.rows;
    __builtin_memset(strip, 0, sizeof(strip));
    for (int64_t i = first; i < last; ++i) {
      const T* row = s.data + i * s.ld;
      for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
        const Vec<T> e = exp<T>(load(row + j) - load(shift + j));
        store(strip + j, load(strip + j) + e);
      }
    }
    for (int64_t j = 0; j < s.cols; ++j) col_sum[j] += strip[j];
  }
}

template <typename T>
void exp2_weights(Tile<T> s, T c, T shift, const T* row_u, const T* col_u) {
  for (int64_t i = 0; i < s.rows; ++i) {
    T* row = s.data + i * s.ld;
    for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
      const Vec<T> e = exp2<T>(load(row + j) * c - shift);
      store(row + j, e * (load(col_u + j) + row_u[i]));
    }
  }
}

template <typename T>
void exp_weights(Tile<T> s, const T* row_k, const T* row_w, const T* col_k, const T* col_w) {
  for (int64_t i = 0; i < s.rows; ++i) {
    T* row = s.data + i * s.ld;
    for (int64_t j = 0; j < s.cols; j += kLanes<T>) {
      const Vec<T> x = load(row + j);
      Vec<T> weight = row_w[i] * exp<T>(x - row_k[i]);
      if (col_k != nullptr) {
        weight += load(col_w + j) * exp<T>(x - load(col_k + j));
      }
      store(row + j, weight);
    }
  }
}

template <typename T>
T sum_squares(const T* x, int64_t n) {
  Vec<T> sum{};
  int64_t k = 0;
  for (; k + kLanes<T> <= n; k += kLanes<T>) sum += load(x + k) * load(x + k);
  T rest = 0;
  for (; k < n; ++k) rest += x[k] * x[k];
  return horizontal_sum<T>(sum) + rest;
}

template <typename T>
T dot(const T* x, const T* y, int64_t n) {
  Vec<T> sum{};
  int64_t k = 0;
  for (; k + kLanes<T> <= n; k += kLanes<T>) sum += load(x + k) * load(y + k);
  T rest = 0;
  for (; k < n; ++k) rest += x[k] * y[k];
  return horizontal_sum<T>(sum) + rest;
}

template <typename T>
void scale_row(T* x, T factor, int64_t n) {
  int64_t k = 0;
  for (; k + kLanes<T> <= n; k += kLanes<T>) store(x + k, load(x + k) * factor);
  for (; k < n; ++k) x[k] *= factor;
}

template <typename T>
T pair_gradient(const T* z, const T* partner, const T* g, T g_factor, T partner_factor, T* dz,
                T* z_dz, int64_t n) {
  Vec<T> sum_g{}, sum_dz{};
  int64_t k = 0;
  for (; k + kLanes<T> <= n; k += kLanes<T>) {
    const Vec<T> d = g_factor * load(g + k) - partner_factor * load(partner + k);
    sum_g += load(z + k) * load(g + k);
    sum_dz += load(z + k) * d;
    store(dz + k, d);
  }
  T rest_g = 0, rest_dz = 0;
  for (; k < n; ++k) {
    const T d = g_factor * g[k] - partner_factor * partner[k];
    rest_g += z[k] * g[k];
    rest_dz += z[k] * d;
    dz[k] = d;
  }
  *z_dz = horizontal_sum<T>(sum_dz) + rest_dz;
  return horizontal_sum<T>(sum_g) + rest_g;
}

template <typename T>
void project_row(T* dz, const T* z, T z_dz, T factor, int64_t n) {
  int64_t k = 0;
  for (; k + kLanes<T> <= n; k += kLanes<T>) {
    store(dz + k, (load(dz + k) - load(z + k) * z_dz) * factor);
  }
  for (; k < n; ++k) dz[k] = (dz[k] - z[k] * z_dz) * factor;
}

template <typename T>
constexpr Kernels<T> kTable = {
    exp2_sums<T>,   maxima<T>, exp_row_sums<T>, exp_col_sums<T>,  exp2_weights<T>, exp_weights<T>,
    sum_squares<T>, dot<T>,    scale_row<T>,    pair_gradient<T>, project_row<T>,
};

}  // namespace

const Kernels<float> kernels_f32 = kTable<float>;
const Kernels<double> kernels_f64 = kTable<double>;

}  // namespace fastcl::cpu::FASTCL_SIMD_NAMESPACE

#if defined(FASTCL_SIMD_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
