// Kernels of the usual kinds, for the emulator's own tests.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/half.h"

namespace fewshot_ext {

constexpr unsigned all_lanes = 0xffffffffu;

template <class T>
__device__ T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(all_lanes, value, offset);
  return value;
}

// One block a row; the block is a multiple of a warp.
template <class T>
__global__ void sum_rows(const T* __restrict__ x,  // [rows, columns]
                         T* __restrict__ sums,     // [rows]
                         int columns) {
  FEWSHOT_EXT_SHARED(T, partial, [32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T sum = 0;
  for (int column = threadIdx.x; column < columns; column += blockDim.x)
    sum += x[static_cast<int64_t>(blockIdx.x) * columns + column];
  sum = warp_sum(sum);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    sum = warp_sum(lane < static_cast<int>(blockDim.x / 32) ? partial[lane] : T(0));
    if (lane == 0) sums[blockIdx.x] = sum;
  }
}

// One warp a row.
template <class Storage>
__global__ void __launch_bounds__(128) softmax_rows(const Storage* __restrict__ x,  // [rows, columns]
                                                    Storage* __restrict__ y,        // [rows, columns]
                                                    int rows, int columns) {
  const int lane = threadIdx.x;
  const int row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  x += static_cast<int64_t>(row) * columns;
  y += static_cast<int64_t>(row) * columns;

  float largest = -INFINITY;
  for (int column = lane; column < columns; column += 32) largest = fmaxf(largest, to_accumulate(x[column]));
  for (int offset = 16; offset > 0; offset /= 2) largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, offset));
  float sum = 0;
  for (int column = lane; column < columns; column += 32) sum += __expf(to_accumulate(x[column]) - largest);
  const float scale = 1.0f / warp_sum(sum);
  for (int column = lane; column < columns; column += 32)
    y[column] = from_accumulate<Storage>(scale * __expf(to_accumulate(x[column]) - largest));
}

// One block of 32 x 8 threads a tile.
__global__ void transpose(const float* __restrict__ x,  // [rows, columns]
                          float* __restrict__ y,        // [columns, rows]
                          int rows, int columns) {
  FEWSHOT_EXT_SHARED(float, tile, [32][33]);
  const int first_row = blockIdx.y * 32, first_column = blockIdx.x * 32;
  for (int i = threadIdx.y; i < 32; i += 8)
    if (first_row + i < rows && first_column + static_cast<int>(threadIdx.x) < columns)
      tile[i][threadIdx.x] = x[static_cast<int64_t>(first_row + i) * columns + first_column + threadIdx.x];
  __syncthreads();
  for (int i = threadIdx.y; i < 32; i += 8)
    if (first_column + i < columns && first_row + static_cast<int>(threadIdx.x) < rows)
      y[static_cast<int64_t>(first_column + i) * rows + first_row + threadIdx.x] = tile[threadIdx.x][i];
}

__global__ void histogram(const int* __restrict__ x,  // [n]
                          int* __restrict__ counts,   // [bins]
                          int n, int bins) {
  int* local = dynamic_shared<int>();  // [bins]
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) local[bin] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&local[x[i]], 1);
  __syncthreads();
  for (int bin = threadIdx.x; bin < bins; bin += blockDim.x) atomicAdd(&counts[bin], local[bin]);
}

// c = a b^T in tiles of 32 x 32, by 64 threads with 4 x 4 results each.
__global__ void __launch_bounds__(64) matmul(const float* __restrict__ a,  // [rows, depth]
                                             const float* __restrict__ b,  // [columns, depth]
                                             float* __restrict__ c,        // [rows, columns]
                                             int rows, int columns, int depth) {
  constexpr int tile = 32, step = 8, each = 4;
  struct alignas(16) Panel {
    float values[step][tile];
  };
  FEWSHOT_EXT_SHARED(Panel, panels, [2]);
  const int first_row = blockIdx.y * tile, first_column = blockIdx.x * tile;
  const int my_row = threadIdx.x / 8 * each, my_column = threadIdx.x % 8 * each;

  float sum[each][each] = {};
  for (int first = 0; first < depth; first += step) {
    for (int i = threadIdx.x; i < tile * step; i += 64) {
      const int line = i / step, k = i % step;
      const bool inside = first + k < depth;
      const int64_t row = first_row + line, column = first_column + line;
      panels[0].values[k][line] = inside && row < rows ? a[row * depth + first + k] : 0.0f;
      panels[1].values[k][line] = inside && column < columns ? b[column * depth + first + k] : 0.0f;
    }
    __syncthreads();
    for (int k = 0; k < step; ++k) {
      const float4 left = *reinterpret_cast<const float4*>(&panels[0].values[k][my_row]);
      const float4 right = *reinterpret_cast<const float4*>(&panels[1].values[k][my_column]);
      const float lefts[each] = {left.x, left.y, left.z, left.w};
      const float rights[each] = {right.x, right.y, right.z, right.w};
      for (int i = 0; i < each; ++i)
        for (int j = 0; j < each; ++j) sum[i][j] = fmaf(lefts[i], rights[j], sum[i][j]);
    }
    __syncthreads();
  }
  for (int i = 0; i < each; ++i)
    for (int j = 0; j < each; ++j)
      if (first_row + my_row + i < rows && first_column + my_column + j < columns)
        c[static_cast<int64_t>(first_row + my_row + i) * columns + first_column + my_column + j] = sum[i][j];
}

// What each warp intrinsic gives to each lane of two warps.
__global__ void warp_intrinsics(const int* __restrict__ x,  // [64]
                                int* __restrict__ y) {      // [12, 64]
  const int i = threadIdx.x;
  const int mine = x[i];
  const unsigned half = i % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  int row = 0;
  const auto put = [&](int value) { y[64 * row++ + i] = value; };
  put(__shfl_sync(all_lanes, mine, 5));
  put(__shfl_sync(all_lanes, mine, i + 3, 8));
  put(__shfl_up_sync(all_lanes, mine, 2));
  put(__shfl_down_sync(all_lanes, mine, 3, 16));
  put(__shfl_xor_sync(all_lanes, mine, 1, 4));
  put(__shfl_xor_sync(half, mine, 7));
  put(static_cast<int>(__ballot_sync(all_lanes, mine > 4)));
  put(__any_sync(half, mine == 0));
  put(__all_sync(half, mine > 0));
  put(static_cast<int>(__match_any_sync(all_lanes, mine)));
  put(__reduce_add_sync(half, mine));
  put(__reduce_max_sync(all_lanes, mine));
}

// Shuffles of one type.
template <class T>
__global__ void warp_intrinsics_of(const T* __restrict__ x,  // [32]
                                   T* __restrict__ y) {      // [4, 32]
  const int i = threadIdx.x;
  y[i] = __shfl_sync(all_lanes, x[i], 5);
  y[32 + i] = __shfl_up_sync(all_lanes, x[i], 2);
  y[64 + i] = __shfl_down_sync(all_lanes, x[i], 3);
  y[96 + i] = __shfl_xor_sync(all_lanes, x[i], 1);
}

// What each function gives. Those of both types are overloads, as a template needs them.
__global__ void math_functions(const float* __restrict__ x,  // [32]
                               double* __restrict__ y) {     // [20, 32]
  const int i = threadIdx.x;
  const float a = __ldg(&x[i]);
  const double b = static_cast<double>(a);
  int row = 0;
  const auto put = [&](double value) { y[32 * row++ + i] = value; };
  const auto both = [&](auto same, auto value) {
    static_assert(std::is_same_v<decltype(same), decltype(value)>);
    put(static_cast<double>(value));
  };
  both(a, exp(a));
  both(b, exp(b));
  both(a, log1p(a));
  both(b, log1p(b));
  both(a, fma(a, a, 1.0f));
  both(b, fma(b, b, 1.0));
  both(a, rsqrt(a));
  both(b, rsqrt(b));
  both(a, min(a, 1.0f));
  both(b, max(b, 1.0f));
  put(static_cast<double>(expf(a) + __expf(a)));
  put(static_cast<double>(log1pf(a)));
  put(static_cast<double>(fmaf(a, 2.0f, 1.0f)));
  put(static_cast<double>(rsqrtf(a) * sqrtf(a)));
  put(static_cast<double>(fmaxf(a, NAN)));
  put(isnan(sqrtf(-1.0f - a)) && !isfinite(a + INFINITY) && isfinite(b) ? 1.0 : 0.0);
  put(static_cast<double>(__uint_as_float(__float_as_uint(a) ^ 0x80000000u)));
  put(static_cast<double>(__int_as_float(__float_as_int(a) & 0x7fffffff)));
  both(0u, min(3u, 2));
  both(0ULL, max(5ULL, 7LL));
}

// Four numbers in one word of memory, turned round.
__global__ void vectors(const float4* __restrict__ x,  // [threads]
                        float4* __restrict__ y) {      // [threads]
  static_assert(alignof(float4) == 16 && sizeof(float3) == 12 && alignof(double2) == 16 && alignof(uint4) == 16);
  const float4 in = __ldcg(&x[threadIdx.x]);
  const float3 tail = make_float3(in.w, in.z, in.y);
  __stcs(&y[threadIdx.x], make_float4(tail.x, tail.y, tail.z, in.x));
}

__global__ void counters(unsigned* counts) {  // [4]
  atomicAdd(&counts[0], 1u);
  atomicInc(&counts[1], 9);
  atomicXor(&counts[2], threadIdx.x);
  atomicMax(&counts[3], threadIdx.x);
}

// Neighbors in one word, lanes ordered in halves of a warp and in chains of them.
__global__ void swap_bytes(const unsigned char* __restrict__ x,  // [threads]
                           unsigned char* __restrict__ y) {      // [threads]
  FEWSHOT_EXT_SHARED(unsigned char, row, [1024]);
  const unsigned lane = threadIdx.x % 32;
  row[threadIdx.x] = x[threadIdx.x];
  __syncwarp(0xffu << (lane & ~7u));
  row[threadIdx.x ^ 1] = static_cast<unsigned char>(row[threadIdx.x ^ 1] + 1);
  __syncwarp(0xffffu << (lane & ~15u));
  __syncwarp();
  y[threadIdx.x] = row[threadIdx.x ^ 31];
}

// Which thread came when.
__global__ void arrivals(int* __restrict__ counter,  // []
                         int* __restrict__ order) {  // [blocks * threads]
  order[atomicAdd(counter, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

// Nothing but barriers, to time them.
__global__ void barriers(int count, int* passed) {
  int rounds = 0;
  for (int i = 0; i < count; ++i) rounds += __syncthreads_or(i % 2 == 0 && threadIdx.x == 0);
  if (threadIdx.x == 0) atomicAdd(passed, rounds);
}

}  // namespace fewshot_ext
