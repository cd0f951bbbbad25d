// Of the allowed similarities of each row: their log-sum-exp, the largest, and the mean under the
// softmax. Never stored: similarities, probabilities.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>

#include "../checks.h"
#include "exp_range.h"
#include "pairs.h"
#include "schedule.h"

namespace fastcl::cpu {
namespace {

using Statistics = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr double kEmpty = -std::numeric_limits<double>::infinity();

// Of some columns of a row, with x = S - largest: the sums of e^x and of x e^x.
struct Moments {
  double largest = kEmpty, sum = 0, moment = 0;

  // What the sums relate to.
  double shift() const { return largest == kEmpty ? 0 : largest; }

  void raise(double candidate) {
    if (!(candidate > largest)) return;
    if (largest != kEmpty) {
      const double step = largest - candidate, factor = std::exp(step);
      moment = factor * (moment + step * sum);
      sum *= factor;
    }
    largest = candidate;
  }

  void add(Moments other) {
    raise(other.largest);
    other.raise(largest);
    sum += other.sum;
    moment += other.moment;
  }
};

template <typename T>
void run(const PairArguments& args, double scale, const Statistics& out) {
  const auto& [lse, largest, mean] = out;
  if (!usable_scale(scale)) {
    for (const at::Tensor& x : {lse, largest, mean}) {
      x.fill_(std::numeric_limits<double>::quiet_NaN());
    }
    return;
  }
  const Pairs<T> pairs(args, static_cast<T>(scale), Summands::kNone);
  const Stripes stripes(pairs.rows().count(), pairs.cols().count());
  const int64_t rows = args.a.size(0);
  std::vector<Moments> parts(stripes.count * rows);
  const auto scratch = [&] { return pairs.scratch(); };
  stripes.run(scratch, [&](auto& tile, int64_t stripe, int64_t i, int64_t j) {
    const Tile<T> s = pairs.similarities(tile, i, j);
    Moments* const part = &parts[stripe * rows + pairs.rows().start(i)];
    T row_max[kMaxTileCols];
    double sum[kMaxTileCols] = {}, moment[kMaxTileCols] = {};
    kernels<T>().maxima(s, row_max, nullptr);
    for (int64_t k = 0; k < s.rows; ++k) {
      part[k].raise(row_max[k]);
      row_max[k] = static_cast<T>(part[k].shift());
    }
    kernels<T>().exp_row_moments(s, row_max, sum, moment);
    for (int64_t k = 0; k < s.rows; ++k) {
      part[k].sum += sum[k];
      part[k].moment += moment[k];
    }
  });
  double* const p_lse = lse.data_ptr<double>();
  double* const p_largest = largest.data_ptr<double>();
  double* const p_mean = mean.data_ptr<double>();
  for (int64_t i = 0; i < rows; ++i) {
    Moments all;
    for (int64_t k = 0; k < stripes.count; ++k) all.add(parts[k * rows + i]);
    p_lse[i] = all.shift() + std::log(all.sum);
    // Maxima pass over NaN, sums do not.
    p_largest[i] = std::isnan(all.sum) ? all.sum : all.largest;
    p_mean[i] = all.sum == 0 ? 0 : all.shift() + all.moment / all.sum;
  }
}

Statistics similarity_stats(const at::Tensor& a, const OptionalTensor& b, const at::Tensor& scale,
                            int64_t offset, int64_t pair) {
  check_operands("similarity_stats", a, b, scale, offset, pair);
  const PlainDispatch plain;
  PairArguments args(a, b, offset, pair, {});
  if (!b.has_value()) args.make_rectangular();
  const Statistics out{row_numbers(a), row_numbers(a), row_numbers(a)};
  compute_type(a) == at::kFloat ? run<float>(args, scale.item<double>(), out)
                                : run<double>(args, scale.item<double>(), out);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastcl, CPU, m) { m.impl("similarity_stats", &similarity_stats); }

}  // namespace fastcl::cpu
