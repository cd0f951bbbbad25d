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
// working thread. Even one task runs inside the parallel region: outside it the matrix product
// would start threads of its own, and round differently.
template <typename MakeScratch, typename Task>
void run_tasks(int64_t count, const MakeScratch& make_scratch, const Task& task) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    int64_t t = next.fetch_add(1, std::memory_order_relaxed);
    if (t >= count) return;
    auto scratch = make_scratch();
    for (; t < count; t = next.fetch_add(1, std::memory_order_relaxed)) task(scratch, t);
  });
}

// Visits every unordered pair of blocks once, (i, i) included: task(scratch, i, j). A round-robin
// tournament: in round r meet the pairs with i + j = r modulo an odd number of players, so that
// each block plays once a round. A pair waits for the earlier rounds of its two blocks. So a task
// may update the sums of both blocks, without locks, and always in the same order.
template <typename MakeScratch, typename Task>
void for_each_block_pair(int64_t blocks, const MakeScratch& make_scratch, const Task& task) {
  if (blocks == 0) return;
  const int64_t players = blocks | 1;  // odd: with an even count one block pauses in each round
  const int64_t pairs = (players + 1) / 2;
  const auto rounds_done = std::make_unique<std::atomic<int64_t>[]>(players);
  for (int64_t b = 0; b < players; ++b) rounds_done[b].store(0, std::memory_order_relaxed);
  std::atomic<bool> failed{false};

  const auto wait_for = [&](int64_t block, int64_t round) {
    // No deadlock: pairs are handed out in order, so the one waited for is running already.
    for (int spins = 0; rounds_done[block].load(std::memory_order_acquire) != round; ++spins) {
      if (failed.load(std::memory_order_relaxed)) return false;
      if (spins > 64) std::this_thread::yield();
    }
    return true;
  };

  run_tasks(players * pairs, make_scratch, [&](auto& scratch, int64_t t) {
    const int64_t round = t / pairs, k = t % pairs;
    const int64_t half = round * ((players + 1) / 2) % players;  // half + half = round
    const int64_t i = (half + k) % players, j = (half - k + players) % players;
    if (!wait_for(i, round) || !wait_for(j, round)) return;
    if (i < blocks && j < blocks) {
      try {
        task(scratch, std::min(i, j), std::max(i, j));
      } catch (...) {
        failed.store(true, std::memory_order_relaxed);  // or the others would wait for ever
        throw;
      }
    }
    rounds_done[i].store(round + 1, std::memory_order_release);
    rounds_done[j].store(round + 1, std::memory_order_release);
  });
}

// The rectangular case: one task per block of rows and stripe of column blocks. Stripes keep the
// threads busy when there are few rows; like the blocks they do not depend on the threads.
struct Stripes {
  int64_t row_blocks, col_blocks, count, width;

  Stripes(int64_t row_blocks, int64_t col_blocks) : row_blocks(row_blocks), col_blocks(col_blocks) {
    constexpr int64_t kTasks = 16;
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
