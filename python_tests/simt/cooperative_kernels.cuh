// Kernels for cooperative launches: right ones, and such with one fault each, which the emulator has to find.
#pragma once

#include <cstdint>

#include "common/grid_barrier.cuh"
#include "kernels.cuh"

namespace fewshot_ext {

// Every block gets the sum over all blocks. One warp a block.
template <bool synchronized>
__global__ void sum_over_grid(const float* __restrict__ x,  // [blocks * 32]
                              float* partial,               // [blocks]
                              float* __restrict__ sums) {   // [blocks]
  const float sum = warp_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
  if constexpr (synchronized) grid_barrier();
  float total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) total += partial[i];
  total = warp_sum(total);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// In place, one element a thread: x[i] becomes the sum of all up to it. Nobody writes before all have read.
template <bool synchronized>
__global__ void scan_grid(int* x) {  // [blocks * threads]
  const int n = static_cast<int>(gridDim.x * blockDim.x);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  for (int distance = 1; distance < n; distance *= 2) {
    const int before = i >= distance ? x[i - distance] : 0;
    if constexpr (synchronized) grid_barrier();
    x[i] += before;
    grid_barrier();
  }
}

// Shared memory of a block outlives the barrier, and no other block's gets into it.
__global__ void keep_shared_memory(const float* __restrict__ x,  // [blocks * threads]
                                   float* __restrict__ y) {      // [blocks * threads]
  FEWSHOT_EXT_SHARED(float, row, [1024]);
  float* doubled = dynamic_shared<float>();
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  row[threadIdx.x] = x[i];
  doubled[threadIdx.x] = 2 * x[i];
  grid_barrier();
  y[i] = row[blockDim.x - 1 - threadIdx.x] + doubled[blockDim.x - 1 - threadIdx.x];
}

// A barrier by hand.
__global__ void wait_for_all_blocks(int* arrived,  // []
                                    int* seen) {   // [blocks]
  if (threadIdx.x == 0) {
    atomicAdd(arrived, 1);
    while (atomicAdd(arrived, 0) < static_cast<int>(gridDim.x)) {
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) seen[blockIdx.x] = atomicAdd(arrived, 0);
}

// Which block comes when, between one barrier and the next.
__global__ void order_of_blocks(int* counter,             // []
                                int* __restrict__ order,  // [phases, blocks]
                                int phases) {
  for (int phase = 0; phase < phases; ++phase) {
    if (threadIdx.x == 0) order[atomicAdd(counter, 1)] = static_cast<int>(blockIdx.x);
    grid_barrier();
  }
}

// Faults. x and y are [threads].

__global__ void leave_before_grid_barrier(const float* x, float* y) {
  if (blockIdx.x == 1) return;
  grid_barrier();
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void leave_between_grid_barriers(const float* x, float* y) {
  for (unsigned i = 0; i < 2 + blockIdx.x; ++i) grid_barrier();
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void leave_block_before_grid_barrier(const float* x, float* y) {
  if (threadIdx.x == 33) return;
  grid_barrier();
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void wait_for_grid_and_for_block(const float* x, float* y) {
  if (threadIdx.x < 32)
    grid_barrier();
  else
    __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void wait_at_two_grid_barriers(const float* x, float* y) {
  if (blockIdx.x == 0) {
    grid_barrier();
    y[threadIdx.x] = x[threadIdx.x];
  } else {
    grid_barrier();
  }
}

__global__ void shuffle_with_lanes_at_grid_barrier(const float* x, float* y) {
  if (threadIdx.x % 32 != 7) y[threadIdx.x] = __shfl_xor_sync(all_lanes, x[threadIdx.x], 1);
  grid_barrier();
}

__global__ void spin_while_others_wait(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(int, flag, [1]);
  if (threadIdx.x == 0) flag[0] = blockIdx.x != 1;
  __syncthreads();
  while (atomicAdd(&flag[0], 0) == 0) {
  }
  grid_barrier();
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void trust_shared_memory_of_another_block(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(float, kept, [1]);
  if (threadIdx.x == 0 && blockIdx.x == 0) kept[0] = x[0];
  grid_barrier();
  y[threadIdx.x] = kept[0];
}

__global__ void overwrite_behind_grid_barrier(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(float, row, [1024]);
  row[threadIdx.x] = x[threadIdx.x];
  grid_barrier();
  y[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
  row[threadIdx.x] = 0;
}

__global__ void point_into_another_block(float** rows) {  // [blocks]
  FEWSHOT_EXT_SHARED(float, row, [64]);
  row[threadIdx.x] = 0;
  if (threadIdx.x == 0) rows[blockIdx.x] = row;
  grid_barrier();
  rows[(blockIdx.x + 1) % gridDim.x][threadIdx.x] = 1;
}

}  // namespace fewshot_ext
