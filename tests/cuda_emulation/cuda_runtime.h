// Enough of the CUDA runtime to run the kernels of csrc/cuda on the CPU, for tests without a GPU.
//
// Thread blocks run one after the other, the threads of a block as coroutines that change over only
// at barriers and warp functions, in a random order: a missing barrier shows as a wrong result.
// Lanes that meet in different functions, deadlocks and writes behind a block's shared memory
// abort.
#pragma once

// The checked longjmp takes a change of stacks for an error.
#undef _FORTIFY_SOURCE
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(...)
#define __restrict__

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
constexpr int cudaDevAttrMaxSharedMemoryPerBlockOptin = 97;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned size = 1) : x(size) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx, blockDim;

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024, kGuard = 1024;
// What a block of the emulated device may have.
inline size_t shared_limit = 227 * 1024;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s in block %u, thread %u\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

// Where some threads wait for the rest, with the value that each of them brought.
struct Meeting {
  std::vector<uint64_t> brought[2];  // of this meeting and of the one before
  std::vector<int> waiting;
  size_t members = 0;
  unsigned count = 0;
  const char* function = nullptr;
};

class Block {
 public:
  Block(unsigned threads, std::function<void()> body)
      : body_(std::move(body)), threads_(threads), warps_(threads / kWarp) {
    if (threads % kWarp != 0 || threads > 1024) fail("wrong number of threads");
    all_.members = threads;
    for (Meeting& warp : warps_) {
      warp.members = kWarp;
      for (auto& values : warp.brought) values.resize(kWarp);
    }
    for (unsigned i = 0; i < threads; ++i) runnable_.push_back(static_cast<int>(i));
  }

  void run() {
    while (!runnable_.empty()) {
      std::swap(runnable_[random_() % runnable_.size()], runnable_.back());
      running_ = runnable_.back();
      runnable_.pop_back();
      threadIdx.x = static_cast<unsigned>(running_);
      resume(threads_[running_]);
    }
    if (finished_ != threads_.size()) fail("deadlock");
  }

  // All values that the lanes of this warp brought to the same call of a function.
  const std::vector<uint64_t>& meet_warp(uint64_t value, const char* function) {
    Meeting& warp = warps_[running_ / kWarp];
    auto& brought = warp.brought[warp.count % 2];
    brought[running_ % kWarp] = value;
    meet(warp, function);
    return brought;
  }

  void meet_all() { meet(all_, "__syncthreads"); }

 private:
  struct Thread {
    ucontext_t context;
    jmp_buf state;
    std::unique_ptr<unsigned char[]> stack;
  };

  static void start();

  // Contexts only to start on another stack: changing over by them takes system calls.
  void resume(Thread& thread) {
    if (_setjmp(main_) != 0) return;
    if (thread.stack != nullptr) _longjmp(thread.state, 1);
    thread.stack.reset(new unsigned char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, &Block::start, 0);
    setcontext(&thread.context);
  }

  void meet(Meeting& meeting, const char* function) {
    if (meeting.waiting.empty()) meeting.function = function;
    if (std::strcmp(meeting.function, function) != 0) fail("lanes in different functions");
    meeting.waiting.push_back(running_);
    if (meeting.waiting.size() == meeting.members) {
      ++meeting.count;
      runnable_.insert(runnable_.end(), meeting.waiting.begin(), meeting.waiting.end());
      meeting.waiting.clear();
    }
    if (_setjmp(threads_[running_].state) == 0) _longjmp(main_, 1);
  }

  std::function<void()> body_;
  std::vector<Thread> threads_;
  jmp_buf main_;
  Meeting all_;
  std::vector<Meeting> warps_;
  std::vector<int> runnable_;
  int running_ = 0;
  size_t finished_ = 0;
  static inline std::mt19937 random_{1};
};

inline Block* block;

inline void Block::start() {
  block->body_();
  ++block->finished_;
  _longjmp(block->main_, 1);
}

template <typename T>
T from_lane(T value, int lane, const char* function) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  const uint64_t found = block->meet_warp(bits, function)[lane];
  std::memcpy(&value, &found, sizeof(value));
  return value;
}

}  // namespace emulation

namespace fastcl::cuda {
inline uint4 shared_memory[(256 * 1024) / 16];
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline void __syncthreads() { emulation::block->meet_all(); }
inline void __syncwarp() { emulation::block->meet_warp(0, "__syncwarp"); }

inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned votes = 0;
  const auto& brought = emulation::block->meet_warp(vote, "__ballot_sync");
  for (int i = 0; i < emulation::kWarp; ++i) votes |= static_cast<unsigned>(brought[i]) << i;
  return votes;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::from_lane(value, lane, "__shfl_sync");
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = static_cast<int>(threadIdx.x) % emulation::kWarp;
  return emulation::from_lane(value, lane < delta ? lane : lane - delta, "__shfl_up_sync");
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int lane = static_cast<int>(threadIdx.x) % emulation::kWarp, from = lane + delta;
  return emulation::from_lane(value, from < emulation::kWarp ? from : lane, "__shfl_down_sync");
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Args... args) {
  if (config->gridDim.x == 0 || config->dynamicSmemBytes > emulation::shared_limit) {
    return cudaErrorInvalidValue;
  }
  blockDim = config->blockDim;
  auto* const memory = reinterpret_cast<unsigned char*>(fastcl::cuda::shared_memory);
  for (unsigned i = 0; i < config->gridDim.x; ++i) {
    blockIdx.x = i;
    std::memset(memory, 0xA5, config->dynamicSmemBytes + emulation::kGuard);
    emulation::Block block(blockDim.x, [&] { kernel(args...); });
    emulation::block = &block;
    block.run();
    for (size_t at = 0; at < emulation::kGuard; ++at) {
      if (memory[config->dynamicSmemBytes + at] != 0xA5) emulation::fail("shared memory overrun");
    }
  }
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  return *value = static_cast<int>(emulation::shared_limit), cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  return *memory = std::malloc(bytes), cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
