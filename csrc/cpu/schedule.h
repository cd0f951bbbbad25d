// Who does which tile, and in what order.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace fastcl::cpu {

// Runs task(scratch, t) for t = 0..count-1, handed out in that order; make_scratch() once per
// working thread. Even one task runs inside the parallel region, which takes two threads: outside
// it the matrix product would start threads of its own, and round differently. More threads than
// tasks are not woken.
template <typename MakeScratch, typename Task>
void run_tasks(int64_t count, const MakeScratch& make_scratch, const Task& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), std::max<int64_t>(count, 2));
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    if (next.load(std::memory_order_relaxed) >= count) return;
    // Before a task is taken: without memory for it no other task would wait for this one's turn.
    auto scratch = make_scratch();
    int64_t t;
    while ((t = next.fetch_add(1, std::memory_order_relaxed)) < count) task(scratch, t);
  });
}

// Tasks of two players each, every player's one after the other in the order of their turns 0, 1,
// ...: a task may update the sums of both, without locks, and always in the same order. No deadlock
// where tasks are handed out in an order that keeps the turns: the one waited for runs already.
class Turns {
 public:
  explicit Turns(int64_t players)
      : done_(std::make_unique<std::atomic<int64_t>[]>(players)) {
    for (int64_t p = 0; p < players; ++p) done_[p].store(0, std::memory_order_relaxed);
  }

  template <typename Task>
  void play(int64_t p, int64_t turn_p, int64_t q, int64_t turn_q, const Task& task) {
    if (!wait_for(p, turn_p) || !wait_for(q, turn_q)) return;
    try {
      task();
    } catch (...) {
      failed_.store(true, std::memory_order_relaxed);  // or the others would wait for ever
      throw;
    }
    done_[p].store(turn_p + 1, std::memory_order_release);
    done_[q].store(turn_q + 1, std::memory_order_release);
  }

 private:
  bool wait_for(int64_t player, int64_t turn) const {
    for (int spins = 0; done_[player].load(std::memory_order_acquire) != turn; ++spins) {
      if (failed_.load(std::memory_order_relaxed)) return false;
      if (spins > 64) std::this_thread::yield();
    }
    return true;
  }

  std::unique_ptr<std::atomic<int64_t>[]> done_;
  std::atomic<bool> failed_{false};
};

// Visits every unordered pair of blocks once, (i, i) included: task(scratch, i, j). A round-robin
// tournament: in round r meet the pairs with i + j = r modulo an odd number of players, so that
// each block plays once a round.
template <typename MakeScratch, typename Task>
void for_each_block_pair(int64_t blocks, const MakeScratch& make_scratch, const Task& task) {
  if (blocks == 0) return;
  const int64_t players = blocks | 1;  // odd: with an even count one block pauses in each round
  const int64_t pairs = (players + 1) / 2;
  Turns turns(players);
  run_tasks(players * pairs, make_scratch, [&](auto& scratch, int64_t t) {
    const int64_t round = t / pairs, k = t % pairs;
    const int64_t half = round * ((players + 1) / 2) % players;  // half + half = round
    const int64_t i = (half + k) % players, j = (half - k + players) % players;
    turns.play(i, round, j, round, [&] {
      if (i < blocks && j < blocks) task(scratch, std::min(i, j), std::max(i, j));
    });
  });
}

// The least number of tasks that keeps the threads of a usual machine busy, not that of this one:
// partial sums must not depend on it.
constexpr int64_t kTasks = 16;

// Every block of rows against every block of columns, the sums of both updated by the task. The
// longer side is cut into stripes, each with partial sums (a copy) of its own for the shorter side.
// In a stripe short block k meets long block k + r, modulo their number, in round r.
struct Cells {
  int64_t row_copies, col_copies;

  Cells(int64_t row_blocks, int64_t col_blocks)
      : short_(std::min(row_blocks, col_blocks)),
        long_(std::max(row_blocks, col_blocks)),
        transposed_(row_blocks > col_blocks) {
    if (short_ == 0) {
      row_copies = col_copies = stripes_ = 1;
      return;
    }
    // No stripe is shorter than the short side: all of that plays in every round.
    stripes_ = std::min((kTasks + short_ - 1) / short_, long_ / short_);
    row_copies = transposed_ ? 1 : stripes_;
    col_copies = transposed_ ? stripes_ : 1;
  }

  // task(scratch, copy of the row sums, copy of the column sums, row block, column block)
  template <typename MakeScratch, typename Task>
  void run(const MakeScratch& make_scratch, const Task& task) const {
    const int64_t width = long_ / stripes_, wider = long_ % stripes_;  // the first ones by one
    const int64_t players = short_ * stripes_;
    Turns turns(players + long_);
    run_tasks(short_ * long_, make_scratch, [&](auto& scratch, int64_t t) {
      const int64_t round = t / players, stripe = t % players / short_, k = t % short_;
      const int64_t local = (k + round) % (width + (stripe < wider));
      // A long block meets k downwards, from its own number or the last.
      const int64_t turn = local < short_ ? (local - k + short_) % short_ : short_ - 1 - k;
      const int64_t other = stripe * width + std::min(stripe, wider) + local;
      turns.play(stripe * short_ + k, round, players + other, turn, [&] {
        if (transposed_) {
          task(scratch, 0, stripe, other, k);
        } else {
          task(scratch, stripe, 0, k, other);
        }
      });
    });
  }

 private:
  int64_t short_, long_, stripes_;
  bool transposed_;
};

// The rectangular case: one task per block of rows and stripe of column blocks. Stripes keep the
// threads busy when there are few rows; like the blocks they do not depend on the threads.
struct Stripes {
  int64_t row_blocks, col_blocks, count, width;

  Stripes(int64_t row_blocks, int64_t col_blocks) : row_blocks(row_blocks), col_blocks(col_blocks) {
    const int64_t wanted = row_blocks == 0 ? 1 : (kTasks + row_blocks - 1) / row_blocks;
    width = std::max<int64_t>(1, (col_blocks + wanted - 1) / wanted);
    count = std::max<int64_t>(1, (col_blocks + width - 1) / width);
  }

  // task(scratch, stripe, row block, column block)
  template <typename MakeScratch, typename Task>
  void run(const MakeScratch& make_scratch, const Task& task) const {
    run_tasks(row_blocks * count, make_scratch, [&](auto& scratch, int64_t t) {
      const int64_t stripe = t % count, i = t / count;
      const int64_t end = std::min(col_blocks, (stripe + 1) * width);
      for (int64_t j = stripe * width; j < end; ++j) task(scratch, stripe, i, j);
    });
  }
};

}  // namespace fastcl::cpu
