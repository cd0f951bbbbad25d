// Vectorised loops over tiles and rows, compiled once per instruction set and chosen at run time,
// so that one wheel serves old and new processors. No torch header here: the per-instruction-set
// files must not emit inline library functions that an older machine might then execute.
#pragma once

#include <cstdint>

namespace fastcl::cpu {

// Tiles have at most kMaxTileCols columns, and rows `ld` apart whose padding up to a multiple of
// kPadLanes may be read and overwritten (it has to hold -inf where sums or maxima are taken).
constexpr int64_t kMaxTileCols = 256;
constexpr int64_t kPadLanes = 16;

template <typename T>
struct Tile {
  T* data;  // [rows, ld]
  int64_t rows;
  int64_t cols;
  int64_t ld;
};

// Ids are compared in lanes as wide as T's.
template <typename T>
struct IdOf;
template <>
struct IdOf<float> {
  using type = uint32_t;
};
template <>
struct IdOf<double> {
  using type = uint64_t;
};
template <typename T>
using Id = typename IdOf<T>::type;

// Vectors of numbers or ids of the columns (col_*) are readable up to the padding.
template <typename T>
struct Kernels {
  // row_sum[i] += sum_j e, col_sum[j] += sum_i e, with e = exp2(s_ij * c - shift).
  // col_sum may be null.
  void (*exp2_sums)(Tile<T> s, T c, T shift, double* row_sum, double* col_sum);

  // row_max[i] = max_j s_ij, col_max[j] = max_i s_ij, NaN ignored. col_max may be null.
  void (*maxima)(Tile<T> s, T* row_max, T* col_max);

  // row_sum[i] += sum_j exp(s_ij - row_shift[i]).
  void (*exp_row_sums)(Tile<T> s, const T* row_shift, double* row_sum);

  // col_sum[j] += sum_i exp(s_ij - col_shift[j]).
  void (*exp_col_sums)(Tile<T> s, const T* col_shift, double* col_sum);

  // s_ij = exp2(s_ij * c - shift) * (row_u[i] + col_u[j]).
  void (*exp2_weights)(Tile<T> s, T c, T shift, const T* row_u, const T* col_u);

  // s_ij = row_w[i] * exp(s_ij - row_k[i]) + col_w[j] * exp(s_ij - col_k[j]);
  // col_k null: the first term only.
  void (*exp_weights)(Tile<T> s, const T* row_k, const T* row_w, const T* col_k, const T* col_w);

  // Where the ids are the same (drop) or differ (otherwise): s_ij = -inf.
  void (*leave_out_ids)(Tile<T> s, const Id<T>* row_id, const Id<T>* col_id, bool drop);

  // Over the pairs of the same id with s_ij above -inf: row_sum[i] += sum_j s_ij, row_count[i] +=
  // their number, and so for the columns unless those are null.
  void (*same_id_sums)(Tile<T> s, const Id<T>* row_id, const Id<T>* col_id, double* row_sum,
                       int64_t* row_count, double* col_sum, int64_t* col_count);

  // s_ij -= row_pull[i] + col_pull[j] where the ids are the same.
  void (*pull_same_ids)(Tile<T> s, const Id<T>* row_id, const Id<T>* col_id, const T* row_pull,
                        const T* col_pull);

  // s_ij += col_bias[j].
  void (*add_bias)(Tile<T> s, const T* col_bias);

  // With x = s_ij + row_beta[i]: row_sum[i] += sum_j softplus(x), row_slope[i] += sum_j sigmoid(x),
  // and s_ij = row_w[i] * sigmoid(x) unless row_w is null.
  void (*softplus_row_sums)(Tile<T> s, const T* row_beta, const T* row_w, double* row_sum,
                            double* row_slope);

  // The same sums over i, with x = s_ij + col_beta[j].
  void (*softplus_col_sums)(Tile<T> s, const T* col_beta, double* col_sum, double* col_slope);

  // s_ij = row_w[i] * sigmoid(s_ij + row_beta[i]) + col_w[j] * sigmoid(s_ij + col_beta[j]); a side
  // whose beta is null has no term.
  void (*sigmoid_weights)(Tile<T> s, const T* row_beta, const T* row_w, const T* col_beta,
                          const T* col_w);

  // With x = s_ij - row_shift[i]: row_sum[i] += sum_j e^x, row_moment[i] += sum_j x e^x.
  void (*exp_row_moments)(Tile<T> s, const T* row_shift, double* row_sum, double* row_moment);

  T (*sum_squares)(const T* x, int64_t n);
  T (*dot)(const T* x, const T* y, int64_t n);
  void (*scale_row)(T* x, T factor, int64_t n);

  // dz = g_factor * g - partner_factor * partner; returns <z, g> and, in *z_dz, <z, dz>.
  T (*pair_gradient)(const T* z, const T* partner, const T* g, T g_factor, T partner_factor, T* dz,
                     T* z_dz, int64_t n);

  // dz = (dz - z * z_dz) * factor.
  void (*project_row)(T* dz, const T* z, T z_dz, T factor, int64_t n);
};

// The kernels for the processor that runs this.
template <typename T>
const Kernels<T>& kernels();

// "avx512", "avx2" or "baseline": what kernels() gives at the moment.
const char* simd_level();

// Makes kernels() give those of this level; false, and nothing happens, where the processor or the
// build lacks it. For tests: not while an op runs.
bool use_simd(const char* name);

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define FASTCL_X86_DISPATCH 1
#endif

namespace baseline {
extern const Kernels<float> kernels_f32;
extern const Kernels<double> kernels_f64;
}  // namespace baseline
#ifdef FASTCL_X86_DISPATCH
namespace avx2 {
extern const Kernels<float> kernels_f32;
extern const Kernels<double> kernels_f64;
}  // namespace avx2
namespace avx512 {
extern const Kernels<float> kernels_f32;
extern const Kernels<double> kernels_f64;
}  // namespace avx512
#endif

}  // namespace fastcl::cpu
