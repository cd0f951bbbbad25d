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

#include "simd_math.inl"

namespace fastcl::cpu::FASTCL_SIMD_NAMESPACE {
namespace {

// Column sums of this many rows are kept in T before they join the double totals.
constexpr int64_t kStripRows = 32;

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

}  // namespace
}  // namespace fastcl::cpu::FASTCL_SIMD_NAMESPACE

#include "simd_pairs.inl"

namespace fastcl::cpu::FASTCL_SIMD_NAMESPACE {
namespace {

template <typename T>
constexpr Kernels<T> kTable = {
    exp2_sums<T>,         maxima<T>,          exp_row_sums<T>,    exp_col_sums<T>,
    exp2_weights<T>,      exp_weights<T>,     leave_out_ids<T>,   same_id_sums<T>,
    pull_same_ids<T>,     add_bias<T>,        softplus_row_sums<T>,
    softplus_col_sums<T>, sigmoid_weights<T>, exp_row_moments<T>, sum_squares<T>,
    dot<T>,               scale_row<T>,       pair_gradient<T>,   project_row<T>,
};

}  // namespace

const Kernels<float> kernels_f32 = kTable<float>;
const Kernels<double> kernels_f64 = kTable<double>;

}  // namespace fastcl::cpu::FASTCL_SIMD_NAMESPACE

#if defined(FASTCL_SIMD_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
