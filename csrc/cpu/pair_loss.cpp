// Loss of every row from the log-sum-exp of its negatives and its positive, and what the backward
// needs of it. x_i = lse_i - s pos_i:
//   loss_i = weight * log(1 + exp(x_i)) - rest * pos_i,   rest = pull - weight * s, 0 without pull;
// with the positive in no sum weight * x_i, 0 where there is no negative. One number a row: double.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "../checks.h"
#include "tiles.h"

namespace fastcl::cpu {
namespace {

struct Inputs {
  const double* lse;  // [2n]
  double scale, weight, rest;
  bool positive_counts;
  int64_t n;
};

// Of row i: its loss, the log-sum-exp of all that its sum counts, and the share of the negatives.
template <typename T>
double row(const Inputs& in, const T* pos, int64_t i, double* whole, double* share) {
  const double positive = pos[i < in.n ? i : i - in.n];
  const double x = in.lse[i] - in.scale * positive;
  double value = x;
  // One pair alone has no negatives, x = -inf: loss 0 and gradient 0, to the bit.
  if (in.positive_counts) {
    const double e = std::exp(-std::abs(x));
    value = (x < 0 ? 0 : x) + std::log1p(e);
    *share = (x < 0 ? e : 1) / (1 + e);
    *whole = in.scale * positive + value;
  } else {
    const bool alone = x == -std::numeric_limits<double>::infinity();
    if (alone) value = 0;
    *share = alone ? 0 : 1;
    *whole = in.lse[i];
  }
  return in.weight * value - in.rest * positive;
}

// Sums up blocks that depend on the number of rows alone: the same bits with any number of threads.
template <typename T, typename Out>
void run(const Inputs& in, const T* pos, std::optional<int64_t> divisor, Out* loss, double* whole,
         double* share) {
  constexpr int64_t kBlock = 1024;
  const int64_t rows = 2 * in.n;
  std::vector<double> sums(divide_up(rows, kBlock));
  at::parallel_for(0, static_cast<int64_t>(sums.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = b * kBlock; i < std::min((b + 1) * kBlock, rows); ++i) {
        const double value = row(in, pos, i, whole + i, share + i);
        if (divisor.has_value()) {
          sums[b] += value;
        } else {
          loss[i] = static_cast<Out>(value);
        }
      }
    }
  });
  if (!divisor.has_value()) return;
  double total = 0;
  for (const double sum : sums) total += sum;
  *loss = static_cast<Out>(total / static_cast<double>(*divisor));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> pair_loss(
    const at::Tensor& pos, const at::Tensor& lse, const at::Tensor& scale, double weight,
    std::optional<double> pull, bool positive_counts, std::optional<int64_t> divisor,
    at::ScalarType dtype) {
  constexpr const char* kOp = "pair_loss";
  check_compute_dtype(kOp, "pos", pos);
  const auto compute = pos.scalar_type();
  const int64_t n = pos.numel();
  check_vector(kOp, "pos", pos, n, compute);
  check_vector(kOp, "lse", lse, 2 * n, at::kDouble);
  check_scalar(kOp, "scale", scale, compute);
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, kOp,
                   ": dtype must be float32 or float64, got ", dtype);
  const PlainDispatch plain;
  const auto empty = [&](at::IntArrayRef shape, at::ScalarType type) {
    return at::Tensor(at::detail::empty_cpu(shape, pos.options().dtype(type)));
  };
  at::Tensor loss = divisor.has_value() ? empty({}, dtype) : empty({2 * n}, dtype);
  at::Tensor whole = empty({2 * n}, at::kDouble), share = empty({2 * n}, at::kDouble);
  const at::Tensor c_lse = lse.contiguous(), c_pos = pos.contiguous();
  const double s = scale.item<double>();
  const double rest = pull.has_value() ? *pull - weight * s : 0;
  const Inputs in{c_lse.data_ptr<double>(), s, weight, rest, positive_counts, n};
  const auto call = [&](auto compute_zero, auto out_zero) {
    using T = decltype(compute_zero);
    using Out = decltype(out_zero);
    run<T, Out>(in, c_pos.data_ptr<T>(), divisor, loss.data_ptr<Out>(), whole.data_ptr<double>(),
                share.data_ptr<double>());
  };
  const auto call_as = [&](auto zero) {
    dtype == at::kFloat ? call(zero, float{}) : call(zero, double{});
  };
  compute == at::kFloat ? call_as(float{}) : call_as(double{});
  return {loss, whole, share};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) { m.impl("pair_loss", &pair_loss); }

}  // namespace fastcl::cpu
