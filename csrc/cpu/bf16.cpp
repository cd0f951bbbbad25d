#include "bf16.h"

#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wunused-parameter"  // of torch's headers
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC's own intrinsics
#endif
#endif
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <vector>

#include "tiles.h"

#if defined(FASTCL_X86_DISPATCH) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
#include <immintrin.h>
#define FASTCL_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#endif

namespace fastcl::cpu {
namespace {

using at::BFloat16;

// x [n, d] transposed, pairs of features interleaved.
void pack_transposed(const BFloat16* x, int64_t ld, int64_t n, int64_t d, BFloat16* out) {
  for (int64_t first = 0; first < n; first += Bf16Panels::kWidth) {
    const int64_t cols = std::min(Bf16Panels::kWidth, n - first);
    for (int64_t k = 0; k < d; k += 2, out += 2 * Bf16Panels::kWidth) {
      std::fill_n(out + 2 * cols, 2 * (Bf16Panels::kWidth - cols), BFloat16(0));
      for (int64_t c = 0; c < cols; ++c) {
        const BFloat16* const pair = x + (first + c) * ld + k;
        out[2 * c] = pair[0];
        out[2 * c + 1] = pair[1];
      }
    }
  }
}

// x [n, d], pairs of rows interleaved, rows of zeros up to a multiple of kSummands.
void pack_plain(const BFloat16* x, int64_t ld, int64_t n, int64_t d, BFloat16* out) {
  const int64_t padded = round_up(n, kSummands);
  const std::vector<BFloat16> zeros(padded == n ? 0 : d, BFloat16(0));
  for (int64_t first = 0; first < d; first += Bf16Panels::kWidth) {
    const int64_t cols = std::min(Bf16Panels::kWidth, d - first);
    for (int64_t k = 0; k < padded; k += 2, out += 2 * Bf16Panels::kWidth) {
      const BFloat16* const even = (k < n ? x + k * ld : zeros.data()) + first;
      const BFloat16* const odd = (k + 1 < n ? x + (k + 1) * ld : zeros.data()) + first;
      std::fill_n(out + 2 * cols, 2 * (Bf16Panels::kWidth - cols), BFloat16(0));
      for (int64_t c = 0; c < cols; ++c) {
        out[2 * c] = even[c];
        out[2 * c + 1] = odd[c];
      }
    }
  }
}

#ifdef FASTCL_BF16

// A product of every shape of tail there is: integers, so that it is exact.
bool product_is_right() {
  constexpr int64_t kRows = 67, kCols = 83, kDepth = 6;
  std::vector<BFloat16> a(kRows * kDepth), b(kCols * kDepth);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i % 7) - 3;
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i % 11) - 5;
  std::vector<BFloat16> packed(Bf16Panels::elements(kDepth, kCols));
  pack_transposed(b.data(), kDepth, kCols, kDepth, packed.data());
  std::vector<float> c(kRows * kCols);
  for (const bool add : {false, true}) {
    bf16_product(a.data(), kRows, kDepth, {packed.data(), kDepth, kCols}, c.data(), kCols, add);
  }
  bf16_release();
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < kCols; ++j) {
      float sum = 0;
      for (int64_t k = 0; k < kDepth; ++k) {
        sum += static_cast<float>(a[i * kDepth + k]) * static_cast<float>(b[j * kDepth + k]);
      }
      if (c[i * kCols + j] != 2 * sum) return false;
    }
  }
  return true;
}

bool detect() {
  __builtin_cpu_init();
  for (const bool there :
       {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bw") != 0,
        __builtin_cpu_supports("avx512dq") != 0, __builtin_cpu_supports("avx512vl") != 0,
        __builtin_cpu_supports("avx512bf16") != 0}) {
    if (!there) return false;
  }
  try {
    return product_is_right();
  } catch (const std::exception&) {
    return false;  // torch has no such kernels
  }
}

// Sixteen rows of sixteen 32-bit numbers in each other's place.
FASTCL_BF16 inline void transpose_16(__m512i* v) {
  __m512i t[16];
  for (int k = 0; k < 16; k += 4) {
    for (int h = 0; h < 4; h += 2) {
      t[k + h] = _mm512_unpacklo_epi32(v[k + h], v[k + h + 1]);
      t[k + h + 1] = _mm512_unpackhi_epi32(v[k + h], v[k + h + 1]);
    }
  }
  // v[k + c]: of rows k .. k + 3 column c of every quarter.
  for (int k = 0; k < 16; k += 4) {
    v[k] = _mm512_unpacklo_epi64(t[k], t[k + 2]);
    v[k + 1] = _mm512_unpackhi_epi64(t[k], t[k + 2]);
    v[k + 2] = _mm512_unpacklo_epi64(t[k + 1], t[k + 3]);
    v[k + 3] = _mm512_unpackhi_epi64(t[k + 1], t[k + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(v[c], v[c + 4], 0x88);
    const __m512i high = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0x88);
    const __m512i low_odd = _mm512_shuffle_i32x4(v[c], v[c + 4], 0xdd);
    const __m512i high_odd = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0xdd);
    t[c] = _mm512_shuffle_i32x4(low, high, 0x88);
    t[c + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
    t[c + 4] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    t[c + 12] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
  for (int k = 0; k < 16; ++k) v[k] = t[k];
}

FASTCL_BF16 inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? 0xffff : n <= 0 ? 0 : (1 << n) - 1;
}

// 32 numbers from x on, zeros from n on.
FASTCL_BF16 inline __m512i rounded(const float* x, int64_t n) {
  const __m512 low = _mm512_maskz_loadu_ps(first_lanes(n), x);
  const __m512 high = _mm512_maskz_loadu_ps(first_lanes(n - 16), x + 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

#endif

}  // namespace

int64_t Bf16Panels::elements(int64_t k, int64_t n) { return k * round_up(n, kWidth); }

bool bf16_supported() {
#ifdef FASTCL_BF16
  static const bool supported = detect();
  return supported;
#else
  return false;
#endif
}

bool bf16_products() { return bf16_supported() && at::globalContext().userEnabledMkldnn(); }

#ifdef FASTCL_BF16

// The largest power of two up to `left`, 64 at most.
static int64_t piece(int64_t left) {
  int64_t size = Bf16Panels::kWidth;
  while (size > left) size /= 2;
  return size;
}

void bf16_product(const BFloat16* a, int64_t m, int64_t lda, const Bf16Panels& b, float* c,
                  int64_t ldc, bool add) {
  constexpr int64_t kWidth = Bf16Panels::kWidth;
  if (b.k == 0) {
    for (int64_t r = 0; r < m && !add; ++r) std::fill_n(c + r * ldc, b.n, 0.f);
    return;
  }
  for (int64_t r = 0, rows; r < m; r += rows) {
    rows = piece(m - r);
    for (int64_t n = 0, cols; n < b.n; n += cols) {
      cols = piece(b.n - n);
      const BFloat16* const panel = b.data + n / kWidth * kWidth * b.k + n % kWidth * 2;
      at::native::cpublas::brgemm(rows, cols, b.k, lda, kWidth, ldc, add, a + r * lda, panel,
                                  c + r * ldc + n, true);
    }
  }
}

void bf16_release() { at::native::cpublas::brgemm_release(true); }

#else

void bf16_product(const BFloat16*, int64_t, int64_t, const Bf16Panels&, float*, int64_t, bool) {}
void bf16_release() {}

#endif

Bf16Rows::Bf16Rows(const at::Tensor& x, int64_t block)
    : count_(divide_up(x.size(0), block)), block_(block), d_(x.size(1)), rows_(x) {
  if (d_ % 2 == 0) return;
  rows_ = at::Tensor(at::detail::empty_cpu({x.size(0), d_ + 1}, x.options()));
  rows_.narrow(1, 0, d_).copy_(x);
  rows_.narrow(1, d_, 1).zero_();
}

Bf16Panels Bf16Rows::columns(int64_t b) const {
  return {panels(columns_, b), round_up(d_, 2), size(b)};
}

Bf16Panels Bf16Rows::summands(int64_t b) const {
  return {panels(summands_, b), round_up(size(b), kSummands), d_};
}

int64_t Bf16Rows::size(int64_t b) const {
  return std::min(block_, rows_.size(0) - b * block_);
}

// pack(block, where its panels go), `elements` of them for a full one.
template <typename Pack>
at::Tensor Bf16Rows::pack(int64_t elements, const Pack& pack) const {
  const at::Tensor packed(at::detail::empty_cpu({count_, elements}, rows_.options()));
  BFloat16* const out = packed.data_ptr<BFloat16>();
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(elements, 1));
  at::parallel_for(0, count_, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) pack(b, out + b * elements);
  });
  return packed;
}

void Bf16Rows::pack_columns() {
  columns_ = pack(Bf16Panels::elements(round_up(d_, 2), block_), [&](int64_t b, BFloat16* out) {
    pack_transposed(rows(b), ld(), size(b), d_, out);
  });
}

void Bf16Rows::pack_summands() {
  summands_ = pack(Bf16Panels::elements(round_up(block_, kSummands), d_), [&](int64_t b, BFloat16* out) {
    pack_plain(rows(b), ld(), size(b), d_, out);
  });
}

#ifdef FASTCL_BF16

FASTCL_BF16 void bf16_tile(const Tile<float>& s, BFloat16* out, int64_t ld) {
  for (int64_t r = 0; r < s.rows; ++r) {
    const float* const row = s.data + r * s.ld;
    for (int64_t c = 0; c < s.cols; c += 32) {
      _mm512_storeu_si512(out + r * ld + c, rounded(row + c, s.cols - c));
    }
  }
}

FASTCL_BF16 void bf16_tile_transposed(const Tile<float>& s, BFloat16* out, int64_t ld) {
  alignas(64) uint16_t order[32];
  for (int k = 0; k < 16; ++k) {
    order[2 * k] = k;
    order[2 * k + 1] = 16 + k;
  }
  const __m512i interleave = _mm512_load_si512(order);
  for (int64_t r = 0; r < s.rows; r += 32) {
    for (int64_t c = 0; c < s.cols; c += 16) {
      const float* const from = s.data + r * s.ld + c;
      __m512i v[16];
      for (int64_t k = 0; k < 16; ++k) {
        const int64_t left = s.rows - r - 2 * k;
        const float* const row = from + 2 * k * s.ld;
        const __m512 even = _mm512_maskz_loadu_ps(left > 0 ? 0xffff : 0, row);
        const __m512 odd = _mm512_maskz_loadu_ps(left > 1 ? 0xffff : 0, row + s.ld);
        v[k] = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
      }
      transpose_16(v);
      const int64_t cols = std::min<int64_t>(16, s.cols - c);
      for (int64_t k = 0; k < cols; ++k) _mm512_storeu_si512(out + (c + k) * ld + r, v[k]);
    }
  }
}

FASTCL_BF16 void round_row(const float* x, BFloat16* out, int64_t n) {
  for (int64_t k = 0; k < n; k += 32) {
    const int64_t left = n - k;
    const __mmask32 kept = left >= 32 ? 0xffffffff : (1u << left) - 1;
    _mm512_mask_storeu_epi16(out + k, kept, rounded(x + k, left));
  }
}

#else

void bf16_tile(const Tile<float>&, BFloat16*, int64_t) {}
void bf16_tile_transposed(const Tile<float>&, BFloat16*, int64_t) {}
void round_row(const float* x, BFloat16* out, int64_t n) { std::copy_n(x, n, out); }

#endif

void widen_row(const BFloat16* x, float* out, int64_t n) { std::copy_n(x, n, out); }

}  // namespace fastcl::cpu
