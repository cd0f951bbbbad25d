// Stable radix sort of up to 16,384 words by one thread block, eight bits a pass.
//
// A warp finds the lanes with its digit by votes, so that a word costs three accesses to counters a
// pass, and four passes sort 32 bits. Counters are 16 bits wide: positions fit, and a warp needs
// 512 bytes. The words of a thread stay in registers, and move through one buffer in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "keys.cuh"

namespace fastcl::cuda {

constexpr int kWarp = 32;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kMaxThreads = 1024;
// Two digits share a word, and a thread of the scan has one word of each warp: the least threads.
constexpr int kScanThreads = kDigits / 2;
constexpr unsigned kFullWarp = 0xFFFFFFFFu;

// Words a thread holds and the most threads; a block has as many warps as its segment needs.
struct Tier {
  int items, threads;

  constexpr int limit() const { return items * threads; }
};
constexpr Tier kTiers[] = {{4, 128}, {8, 128}, {16, kMaxThreads}};

constexpr int tier_threads(int items) {
  for (const Tier& tier : kTiers) {
    if (tier.items == items) return tier.threads;
  }
  return 0;
}

constexpr int block_threads(int n, int items) {
  const int threads = (n + items * kWarp - 1) / (items * kWarp) * kWarp;
  return threads < kScanThreads ? kScanThreads : threads;
}

// Shared memory of a block: counters of each warp, four scan totals, 32 sums, `buffers` of words.
constexpr int kTotalBytes = 16, kSumBytes = kMaxThreads / kWarp * 8;
constexpr size_t block_bytes(int threads, int items, int buffers) {
  return threads / kWarp * kDigits * sizeof(uint16_t) + kTotalBytes + kSumBytes +
         size_t{4} * threads * items * buffers;
}
static_assert(block_bytes(kMaxThreads, 16, 2) <= 163 * 1024, "shared memory of sm_80");

// The dynamic shared memory of this block.
__device__ inline unsigned char* block_memory() {
  extern __shared__ uint4 shared_memory[];
  return reinterpret_cast<unsigned char*>(shared_memory);
}

template <int kItems>
class BlockSort {
 public:
  // Item i of this thread is number first() + 32 i of the n words of the block. The warp's number
  // takes a shuffle, lest the compiler keep what follows from it from one sort to the next.
  __device__ explicit BlockSort(int n)
      : counters_(reinterpret_cast<uint16_t*>(block_memory())),
        totals_(reinterpret_cast<uint32_t*>(counters_ + blockDim.x / kWarp * kDigits)),
        lane_(threadIdx.x % kWarp),
        warp_(__shfl_sync(kFullWarp, threadIdx.x / kWarp, 0)),
        n_(n),
        warps_((n + kWarp * kItems - 1) / (kWarp * kItems)) {}

  __device__ int first() const { return warp_ * kWarp * kItems + lane_; }
  // Warps past the words have nothing to do but to come to the barriers.
  __device__ bool active() const { return warp_ < warps_; }

  // In shared memory behind the counters: one sum a warp, then the buffers.
  __device__ double* sums() const { return reinterpret_cast<double*>(totals_ + kTotalBytes / 4); }
  __device__ uint32_t* buffer(int i) const {
    return totals_ + (kTotalBytes + kSumBytes) / 4 + i * blockDim.x * kItems;
  }

  // Bits of the numbers of this thread. All loads before the first use, so that all are under way.
  template <typename Bits>
  __device__ void load(const Bits* __restrict__ from, uint32_t (&word)[kItems]) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int at = first() + i * kWarp;
      word[i] = at < n_ ? from[at] : 0;
    }
  }

  // The keys of floats; padding sorts behind all of them.
  __device__ void load_keys(const float* __restrict__ from, uint32_t (&word)[kItems]) const {
    load(reinterpret_cast<const uint32_t*>(from), word);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool is_padding = first() + i * kWarp >= n_;
      word[i] = is_padding ? ~0u : key_of(word[i], kFloat32Format);
    }
  }

  // Puts the position of each word in the stable order of the digits at `shift` into the high half
  // of its slot; the low half is the caller's. Halves, because 48 registers of items would spill.
  __device__ void rank(const uint32_t (&word)[kItems], int shift, uint32_t (&slot)[kItems]) const {
    uint16_t* const mine = counters_ + warp_ * kDigits;  // [kDigits]
    if (active()) {
      // Lanes may still read the counters of the pass before.
      __syncwarp();
      reinterpret_cast<uint4*>(mine)[lane_] = make_uint4(0, 0, 0, 0);
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const uint32_t digit = digit_of(word[i], shift);
        const uint32_t peers = lanes_with(digit);
        const uint32_t rank = mine[digit] + __popc(peers & ((1u << lane_) - 1));
        __syncwarp();
        // The last of them leaves the count for the next item.
        if (peers >> lane_ == 1) mine[digit] = static_cast<uint16_t>(rank + 1);
        __syncwarp();
        slot[i] = (slot[i] & 0xFFFF) | rank << 16;
      }
    }
    scan();
    if (active()) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        slot[i] += static_cast<uint32_t>(mine[digit_of(word[i], shift)]) << 16;
      }
    }
  }

  static __device__ uint32_t rank_of(uint32_t slot) { return slot >> 16; }

  // Words to their ranks. No thread may read `to` any more.
  __device__ void scatter(const uint32_t (&word)[kItems], const uint32_t (&slot)[kItems],
                          uint32_t* to) const {
    if (active()) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) to[rank_of(slot[i])] = word[i];
    }
  }

  // The same through a buffer and back: afterwards this thread has the words of its positions.
  __device__ void move(uint32_t (&word)[kItems], const uint32_t (&slot)[kItems],
                       uint32_t* through) const {
    scatter(word, slot, through);
    __syncthreads();
    if (active()) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) word[i] = through[first() + i * kWarp];
    }
  }

  // The low halves of the slots likewise, through a buffer that may have been read just now.
  __device__ void move_low(uint32_t (&slot)[kItems], uint32_t* buffer) const {
    uint16_t* const through = reinterpret_cast<uint16_t*>(buffer);
    __syncthreads();
    if (active()) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) through[rank_of(slot[i])] = static_cast<uint16_t>(slot[i]);
    }
    __syncthreads();
    if (active()) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) slot[i] = through[first() + i * kWarp];
    }
  }

 private:
  static __device__ uint32_t digit_of(uint32_t word, int shift) {
    return word >> shift & (kDigits - 1);
  }

  // The lanes that have this bit as this lane has it. In PTX: one test of the bit serves the vote
  // and the inversion, where the compiler makes three.
  static __device__ uint32_t lanes_like(uint32_t digit, uint32_t bit) {
#ifdef __CUDA_ARCH__
    uint32_t lanes;
    asm volatile(
        "{\n"
        ".reg .pred set;\n"
        ".reg .b32 masked;\n"
        "and.b32 masked, %1, %2;\n"
        "setp.ne.u32 set, masked, 0;\n"
        "vote.sync.ballot.b32 %0, set, 0xffffffff;\n"
        "@!set not.b32 %0, %0;\n"
        "}\n"
        : "=r"(lanes)
        : "r"(digit), "r"(bit));
    return lanes;
#else
    const bool set = (digit & bit) != 0;
    return __ballot_sync(kFullWarp, set) ^ (set ? 0 : kFullWarp);
#endif
  }

  static __device__ uint32_t lanes_with(uint32_t digit) {
    uint32_t lanes = kFullWarp;
#pragma unroll
    for (int bit = 0; bit < kDigitBits; ++bit) lanes &= lanes_like(digit, 1u << bit);
    return lanes;
  }

  // Counts of the warps to where each warp's words of a digit begin.
  __device__ void scan() const {
    uint32_t* const column = reinterpret_cast<uint32_t*>(counters_) + threadIdx.x;
    const bool scans = threadIdx.x < kScanThreads;
    __syncthreads();
    uint32_t both = 0, count = 0, until = 0;
    if (scans) {
#pragma unroll 8
      for (int w = 0; w < warps_; ++w) both += column[w * kScanThreads];
      until = count = (both & 0xFFFF) + (both >> 16);
#pragma unroll
      for (int delta = 1; delta < kWarp; delta *= 2) {
        const uint32_t left = __shfl_up_sync(kFullWarp, until, delta);
        if (lane_ >= delta) until += left;
      }
      if (lane_ == kWarp - 1) totals_[warp_] = until;
    }
    __syncthreads();
    if (scans) {
      uint32_t begin = until - count;
      for (int w = 0; w < warp_; ++w) begin += totals_[w];
      uint32_t next = begin | (begin + (both & 0xFFFF)) << 16;
#pragma unroll 8
      for (int w = 0; w < warps_; ++w) {
        const uint32_t counts = column[w * kScanThreads];
        column[w * kScanThreads] = next;
        next += counts;
      }
    }
    __syncthreads();
  }

  uint16_t* counters_;  // [warps, kDigits]
  uint32_t* totals_;    // [4]
  int lane_, warp_, n_, warps_;
};

}  // namespace fastcl::cuda
