// Sums and other reductions over the lanes of a warp and the threads of a block.
#pragma once

#include "common/device.h"

namespace fewshot_ext {

constexpr int warp_lanes = 32;
constexpr unsigned all_lanes = 0xffffffffu;

// Over each group of `width` neighboring lanes, a power of 2; every lane gets the result. The order of the operations
// does not depend on the lane, so all get the same bits.
template <int width = warp_lanes, class T, class Operation>
__device__ __forceinline__ T warp_reduce(T value, Operation operation) {
#pragma unroll
  for (int distance = width / 2; distance > 0; distance /= 2)
    value = operation(value, __shfl_xor_sync(all_lanes, value, distance));
  return value;
}

template <int width = warp_lanes, class T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_reduce<width>(value, [](T a, T b) { return a + b; });
}

template <int width = warp_lanes, class T>
__device__ __forceinline__ T warp_max(T value) {
  return warp_reduce<width>(value, [](T a, T b) { return a > b ? a : b; });
}

// Over a block of `threads` in one dimension, for all of them. Every thread of the block has to call it.
template <int threads, class T, class Operation>
__device__ T block_reduce(T value, Operation operation) {
  static_assert(threads % warp_lanes == 0 && threads <= warp_lanes * warp_lanes);
  constexpr int warps = threads / warp_lanes;
  FEWSHOT_EXT_SHARED(T, of_warp, [warps]);
  __syncthreads();  // the last call's readers are done
  value = warp_reduce(value, operation);
  if (threadIdx.x % warp_lanes == 0) of_warp[threadIdx.x / warp_lanes] = value;
  __syncthreads();
  value = of_warp[0];
  for (int warp = 1; warp < warps; ++warp) value = operation(value, of_warp[warp]);
  return value;
}

template <int threads, class T>
__device__ T block_sum(T value) {
  return block_reduce<threads>(value, [](T a, T b) { return a + b; });
}

}  // namespace fewshot_ext
