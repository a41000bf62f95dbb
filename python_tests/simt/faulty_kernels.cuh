// Kernels with one fault each, which the emulator has to find. x and y are [threads] to all of them.
#pragma once

#include <cassert>

#include "common/device.h"

namespace fewshot_ext {

template <bool synchronized>
__global__ void reverse(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(float, row, [1024]);
  row[threadIdx.x] = x[threadIdx.x];
  if constexpr (synchronized) __syncthreads();
  y[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

// The second round overwrites what slow threads still read.
__global__ void reverse_twice(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(float, row, [1024]);
  for (int round = 0; round < 2; ++round) {
    row[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
  }
}

template <bool synchronized>
__global__ void reverse_in_warp(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(float, row, [1024]);
  const unsigned first = threadIdx.x / 32 * 32;
  row[threadIdx.x] = x[threadIdx.x];
  if constexpr (synchronized) __syncwarp();
  // A shuffle makes lanes wait for each other and yet orders no memory.
  const float other = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
  y[threadIdx.x] = row[first + 31 - threadIdx.x % 32] + 0.0f * other;
}

__global__ void synchronize_half_warps(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(float, row, [1024]);
  row[threadIdx.x] = x[threadIdx.x];
  const unsigned half = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  __syncwarp(half);
  y[threadIdx.x] = row[threadIdx.x ^ 16];
}

__global__ void mix_atomic_and_plain(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(float, sum, [1]);
  if (threadIdx.x == 0) sum[0] = 0;
  __syncthreads();
  atomicAdd(&sum[0], x[threadIdx.x]);
  y[threadIdx.x] = sum[0];
}

__global__ void leave_before_barrier(const float* x, float* y) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void wait_at_two_barriers(const float* x, float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
  } else {
    __syncthreads();
    y[threadIdx.x] = -x[threadIdx.x];
  }
}

__global__ void leave_before_shuffle(const float* x, float* y) {
  if (threadIdx.x % 32 == 7) return;
  y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}

__global__ void wait_elsewhere_than_the_shuffle(const float* x, float* y) {
  if (threadIdx.x % 32 != 7) y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
  __syncthreads();
}

__global__ void differ_in_masks(const float* x, float* y) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0xffffffffu : 0xffff0000u;
  y[threadIdx.x] = static_cast<float>(__ballot_sync(mask, x[threadIdx.x] > 0));
}

__global__ void differ_in_intrinsics(const float* x, float* y) {
  y[threadIdx.x] = threadIdx.x % 2 == 0 ? static_cast<float>(__any_sync(0xffffffffu, x[threadIdx.x] > 0))
                                        : __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}

__global__ void leave_oneself_out(const float* x, float* y) {
  y[threadIdx.x] = static_cast<float>(__any_sync(0x0000ffffu, x[threadIdx.x] > 0));
}

__global__ void read_outside_the_mask(const float* x, float* y) {
  if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 20);
}

__global__ void trust_active_mask(const float* x, float* y) {
  y[threadIdx.x] = __shfl_xor_sync(__activemask(), x[threadIdx.x], 1);
}

template <int offset>
__global__ void index_past_the_array(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(float, other, [64]);
  FEWSHOT_EXT_SHARED(float, row, [64]);
  other[threadIdx.x] = 0;
  float* shifted = row + offset;
  shifted[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = shifted[threadIdx.x];
}

__global__ void leave_the_row_of_a_tile(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(float, tile, [8][33]);
  for (int i = threadIdx.x; i < 8 * 33; i += blockDim.x) tile[i / 33][i % 33] = x[0];
  __syncthreads();
  y[threadIdx.x] = tile[0][threadIdx.x];
}

__global__ void ask_for_too_little(const float* x, float* y) {
  float* row = dynamic_shared<float>();
  row[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = row[threadIdx.x];
}

__global__ void read_before_writing(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(float, row, [1024]);
  if (threadIdx.x != 5) row[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = row[threadIdx.x];
}

// The first block writes it, the others find their own memory empty.
__global__ void keep_between_blocks(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(float, kept, [1]);
  if (threadIdx.x == 0 && blockIdx.x == 0) kept[0] = x[0];
  __syncthreads();
  y[threadIdx.x] = kept[0];
}

__global__ void wait_for_nobody(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(int, flag, [1]);
  if (threadIdx.x == 0) flag[0] = 0;
  __syncthreads();
  while (atomicAdd(&flag[0], 0) == 0) {
  }
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void give_up(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x == 3) __trap();
}

__global__ void break_an_assertion(const float* x, float* y) {
  assert(x[threadIdx.x] == 1 && threadIdx.x != 5);
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void declare_too_much(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(float, row, [12289]);
  row[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = row[threadIdx.x];
}

__global__ void write_past_global_memory(const float* x, float* y) { y[threadIdx.x + 1] = x[threadIdx.x]; }

// Fours of floats, from an array that is aligned as one float.
__global__ void read_fours_of_floats(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(float, row, [64]);
  row[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  const float4 four = reinterpret_cast<const float4*>(row)[threadIdx.x / 4];
  y[threadIdx.x] = four.x + four.y + four.z + four.w;
}

// The same in global memory, one element too far.
__global__ void read_fours_from_the_next_float_on(const float* x, float* y) {
  const float4 four = *reinterpret_cast<const float4*>(x + threadIdx.x % 2);
  y[threadIdx.x] = four.x + four.y + four.z + four.w;
}

}  // namespace fewshot_ext
