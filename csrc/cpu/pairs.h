// The pairs of rows of a [R, D] and b [C, D] that an op sees, and the tiles of their similarities.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include "../checks.h"
#include "simd.h"
#include "tiles.h"

namespace fastcl::cpu {

using OptionalTensor = std::optional<at::Tensor>;

inline const at::Tensor* pointer(const OptionalTensor& x) {
  return x.has_value() ? &*x : nullptr;
}

inline OptionalTensor contiguous(const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(x->contiguous()) : std::nullopt;
}

inline at::Tensor row_numbers(const at::Tensor& x, at::ScalarType dtype = at::kDouble) {
  return at::Tensor(at::detail::empty_cpu({x.size(0)}, x.options().dtype(dtype)));
}

// x / factor of n rows, or `missing` for each, padded so that vectors may read past the last one.
template <typename T>
std::vector<T> padded(const OptionalTensor& x, int64_t n, T missing, double factor = 1) {
  std::vector<T> result(n + kMaxTileCols, T(0));
  if (x.has_value()) {
    const T* const data = x->const_data_ptr<T>();
    for (int64_t i = 0; i < n; ++i) result[i] = static_cast<T>(data[i] / factor);
  } else {
    std::fill_n(result.begin(), n, static_cast<T>(missing / factor));
  }
  return result;
}

// Ids as numbers of Id<T>, equal where the ids are equal; padded.
template <typename T>
class IdCodes {
 public:
  IdCodes(const at::Tensor& a, const at::Tensor* b) {
    const int64_t* const p_a = a.const_data_ptr<int64_t>();
    const int64_t* const p_b = b == nullptr ? nullptr : b->const_data_ptr<int64_t>();
    const int64_t n_a = a.numel(), n_b = b == nullptr ? 0 : b->numel();
    int64_t smallest = std::numeric_limits<int64_t>::max(), largest = -smallest - 1;
    const auto widen = [&](int64_t id) {
      smallest = std::min(smallest, id);
      largest = std::max(largest, id);
    };
    std::for_each(p_a, p_a + n_a, widen);
    std::for_each(p_b, p_b + n_b, widen);
    const uint64_t span = static_cast<uint64_t>(largest) - static_cast<uint64_t>(smallest);
    if (n_a + n_b == 0 || span <= std::numeric_limits<Id<T>>::max()) {
      const auto code = [&](int64_t id) {
        return static_cast<Id<T>>(static_cast<uint64_t>(id) - static_cast<uint64_t>(smallest));
      };
      fill(rows_, p_a, n_a, code);
      fill(cols_, p_b, n_b, code);
    } else {
      // Too far apart: their place among the sorted ids.
      std::vector<int64_t> sorted(p_a, p_a + n_a);
      sorted.insert(sorted.end(), p_b, p_b + n_b);
      std::sort(sorted.begin(), sorted.end());
      const auto code = [&](int64_t id) {
        const auto place = std::lower_bound(sorted.begin(), sorted.end(), id);
        return static_cast<Id<T>>(place - sorted.begin());
      };
      fill(rows_, p_a, n_a, code);
      fill(cols_, p_b, n_b, code);
    }
    shared_ = b == nullptr;
  }

  const Id<T>* row(int64_t i) const { return &rows_[i]; }
  const Id<T>* col(int64_t j) const { return shared_ ? &rows_[j] : &cols_[j]; }

 private:
  template <typename Code>
  static void fill(std::vector<Id<T>>& codes, const int64_t* ids, int64_t n, const Code& code) {
    codes.assign(n + kMaxTileCols, 0);
    std::transform(ids, ids + n, codes.begin(), code);
  }

  std::vector<Id<T>> rows_, cols_;
  bool shared_;
};

// What the ops were asked, as they pass it on: contiguous, and without b only where S is symmetric.
struct PairArguments {
  at::Tensor a;
  OptionalTensor b;
  int64_t offset, pair;
  PairIds ids;
  OptionalTensor bias;

  PairArguments(const at::Tensor& rows, const OptionalTensor& columns, int64_t offset, int64_t pair,
                PairIds pair_ids, const OptionalTensor& column_bias = std::nullopt)
      : a(operand(rows)),
        b(columns.has_value() ? OptionalTensor(operand(*columns)) : std::nullopt),
        offset(offset),
        pair(pair),
        ids(std::move(pair_ids)),
        bias(contiguous(column_bias)) {
    if (bias.has_value() && !b.has_value()) make_rectangular();
  }

  // The rows themselves as columns, where S_ij is not S_ji or only the sums of the rows are wanted.
  void make_rectangular() {
    b = a;
    ids.b = ids.a;
  }

  const at::Tensor& columns() const { return b.has_value() ? *b : a; }

 private:
  static at::Tensor operand(const at::Tensor& x) {
    const bool widen = x.scalar_type() == at::kBFloat16 && !bf16_products();
    return (widen ? x.to(at::kFloat) : x).contiguous();
  }
};

// What is summed up with the weights of a tile: nothing, the columns, or both sides.
enum class Summands { kNone, kColumns, kBoth };

template <typename T>
class Pairs {
 public:
  // factor: of the products in a tile.
  Pairs(const PairArguments& args, T factor, Summands summands)
      : args_(args),
        factor_(factor),
        rows_(args.a, block_rows<T>(args.a.size(0)), !args.b.has_value(),
              summands == Summands::kBoth || (summands != Summands::kNone && !args.b.has_value())) {
    if (args.b.has_value()) {
      cols_.emplace(*args.b, block_rows<T>(args.b->size(0)), true, summands != Summands::kNone);
    }
    if (args.ids.same != Same::kKeep) codes_.emplace(*args.ids.a, pointer(args.ids.b));
    if (args.bias.has_value()) bias_ = padded<T>(args.bias, args.bias->numel(), T(0));
  }

  const RowBlocks& rows() const { return rows_; }
  const RowBlocks& cols() const { return cols_.has_value() ? *cols_ : rows_; }
  TileScratch<T> scratch() const {
    return TileScratch<T>(args_.a, rows().block(), cols().block());
  }

  // Products of row block i and column block j, -inf in the padding and for pairs left out.
  Tile<T> products(TileScratch<T>& scratch, int64_t i, int64_t j) const {
    const Tile<T> s =
        scratch.product(rows(), i, cols(), j, args_.offset, args_.pair, factor_);
    const bool drop = args_.ids.same == Same::kDrop;
    if (drop || args_.ids.same == Same::kOnly) {
      kernels<T>().leave_out_ids(s, row_ids(i), col_ids(j), drop);
    }
    return s;
  }

  void add_bias(const Tile<T>& s, int64_t j) const {
    if (!bias_.empty()) kernels<T>().add_bias(s, &bias_[cols().start(j)]);
  }

  Tile<T> similarities(TileScratch<T>& scratch, int64_t i, int64_t j) const {
    const Tile<T> s = products(scratch, i, j);
    add_bias(s, j);
    return s;
  }

  const Id<T>* row_ids(int64_t i) const { return codes_->row(rows().start(i)); }
  const Id<T>* col_ids(int64_t j) const { return codes_->col(cols().start(j)); }

 private:
  const PairArguments& args_;
  T factor_;
  RowBlocks rows_;
  std::optional<RowBlocks> cols_;
  std::optional<IdCodes<T>> codes_;
  std::vector<T> bias_;  // empty for none
};

}  // namespace fastcl::cpu
