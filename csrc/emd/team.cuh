// The threads that solve one transportation problem together: a warp, or a block.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/reduce.cuh"

namespace fewshot_ext {

__device__ __forceinline__ unsigned warp_max(unsigned value) { return __reduce_max_sync(all_lanes, value); }

__device__ __forceinline__ uint64_t warp_max(uint64_t value) {
  const auto high = static_cast<unsigned>(value >> 32);
  const unsigned top = __reduce_max_sync(all_lanes, high);
  const unsigned low = high == top ? static_cast<unsigned>(value) : 0u;
  return static_cast<uint64_t>(top) << 32 | __reduce_max_sync(all_lanes, low);
}

// The value, of which the compiler no longer knows where it is from.
__device__ __forceinline__ int forgotten(int value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// A thread takes every `threads`-th of up to `most_nodes` nodes. A team of one warp never meets a barrier of its block,
// so that several of them can share one and each go at its own pace.
template <int threads_, int most_nodes>
class Team {
 public:
  static constexpr int threads = threads_, warps = threads / warp_lanes;
  static constexpr int nodes = most_nodes, nodes_each = nodes / threads;
  static_assert(threads % warp_lanes == 0 && nodes % threads == 0 && warp_lanes % warps == 0);

  struct Memory {
    uint64_t of_warp[2][warps];
  };

  __device__ explicit Team(Memory& memory) : memory_(memory) {}

  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x) % threads; }
  __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x) % warp_lanes; }
  __device__ __forceinline__ int warp() const { return thread() / warp_lanes; }

  __device__ __forceinline__ void sync() const {
    if constexpr (warps == 1)
      __syncwarp(all_lanes);
    else
      __syncthreads();
  }

  // For all threads; all have to call it.
  template <class T>
  __device__ __forceinline__ T max(T value) {
    value = warp_max(value);
    if constexpr (warps > 1) {
      // Two places in turn: whoever still reads one is waited for by the call that uses the other.
      uint64_t* of_warp = memory_.of_warp[turn_];
      turn_ ^= 1;
      if (lane() == 0) of_warp[warp()] = value;
      sync();
      value = warp_max(static_cast<T>(of_warp[lane() % warps]));
    }
    return value;
  }

  // Likewise the sum.
  __device__ __forceinline__ double sum(double value) {
    value = warp_sum(value);
    if constexpr (warps > 1) {
      uint64_t* of_warp = memory_.of_warp[turn_];
      turn_ ^= 1;
      if (lane() == 0) of_warp[warp()] = bit_cast<uint64_t>(value);
      sync();
      value = warp_sum<warps>(bit_cast<double>(of_warp[lane() % warps]));
    }
    return value;
  }

 private:
  Memory& memory_;
  int turn_ = 0;
};

}  // namespace fewshot_ext
