// Kernels with one fault each in an asynchronous copy, which the emulator has to find. x and y are [threads] to most of
// them, and four threads share a copy of four floats.
#pragma once

#include "common/mma.cuh"

namespace fewshot_ext {

struct alignas(16) Fours {
  float at[1024];
};

// What each thread reads afterwards: the element of the thread that mirrors it within `width` neighbors.
__device__ inline unsigned mirrored(unsigned width) { return threadIdx.x ^ (width - 1); }

__device__ inline void copy_four(Fours& fours, const float* x, Caller caller = Caller::current()) {
  if (threadIdx.x % 4 == 0) cp_async(&fours.at[threadIdx.x], &x[threadIdx.x], caller);
}

// Right with a commit and none pending.
template <bool committed, int pending>
__global__ void mirror_async(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(Fours, fours, );
  copy_four(fours, x);
  if constexpr (committed) cp_async_commit();
  cp_async_wait<pending>();
  __syncthreads();
  y[threadIdx.x] = fours.at[mirrored(64)];
  if constexpr (!committed) cp_async_commit();
  cp_async_wait<0>();
}

__global__ void read_before_the_wait(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(Fours, fours, );
  copy_four(fours, x);
  cp_async_commit();
  __syncthreads();
  y[threadIdx.x] = fours.at[mirrored(64)];
  cp_async_wait<0>();
}

__global__ void read_ones_own_before_the_wait(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(Fours, fours, );
  copy_four(fours, x);
  cp_async_commit();
  if (threadIdx.x % 4 == 0) y[threadIdx.x] = fours.at[threadIdx.x];
  cp_async_wait<0>();
}

// The barrier between issue and wait is none between the wait and others.
__global__ void wait_without_barrier(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(Fours, fours, );
  copy_four(fours, x);
  cp_async_commit();
  __syncthreads();
  cp_async_wait<0>();
  const float other = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
  y[threadIdx.x] = fours.at[mirrored(32)] + 0.0f * other;
}

__global__ void write_before_the_wait(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(Fours, fours, );
  copy_four(fours, x);
  cp_async_commit();
  __syncthreads();
  if (threadIdx.x == 9) fours.at[9] = 0;
  __syncthreads();
  cp_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = fours.at[mirrored(64)];
}

__global__ void copy_twice(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(Fours, fours, );
  copy_four(fours, x);
  copy_four(fours, x);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  y[threadIdx.x] = fours.at[mirrored(64)];
}

// Slow threads still read what the next copy is for.
__global__ void copy_over_what_is_read(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(Fours, fours, );
  for (int round = 0; round < 2; ++round) {
    copy_four(fours, x);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    y[threadIdx.x] = fours.at[mirrored(64)];
  }
}

__global__ void exit_before_the_wait(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(Fours, fours, );
  copy_four(fours, x);
  cp_async_commit();
  y[threadIdx.x] = x[threadIdx.x];
}

// Changes what is being copied, which it may not: 1 or 2 arrives. By one warp.
__global__ void copy_what_changes(float* x,    // [4]
                                  float* y) {  // []
  FEWSHOT_EXT_SHARED(Fours, fours, );
  if (threadIdx.x == 0) cp_async(fours.at, x);
  cp_async_commit();
  __syncwarp();
  if (threadIdx.x == 1) x[0] = 2;
  __syncwarp();
  cp_async_wait<0>();
  if (threadIdx.x == 0) *y = fours.at[0];
}

__global__ void copy_to_a_misaligned_address(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(Fours, fours, );
  cp_async(&fours.at[4 * threadIdx.x + 2], x);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = 0;
}

__global__ void copy_from_a_misaligned_address(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(Fours, fours, );
  cp_async(&fours.at[4 * threadIdx.x], x + 1);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = 0;
}

__global__ void copy_past_the_array(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(Fours, fours, );
  cp_async(&fours.at[0] + 1000 + 4 * threadIdx.x, x);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = 0;
}

__global__ void copy_to_global_memory(const float* x, float* y) {
  cp_async(y + threadIdx.x / 4 * 4, x + threadIdx.x / 4 * 4);
  cp_async_commit();
  cp_async_wait<0>();
}

__global__ void copy_too_many_bytes(const float* x, float* y) {
  FEWSHOT_EXT_SHARED(Fours, fours, );
  cp_async(&fours.at[4 * threadIdx.x], x, 20);
  cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = 0;
}

}  // namespace fewshot_ext
