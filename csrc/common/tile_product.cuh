// Products of 32 x 32 tiles by one block, in plain fused multiply-adds: for matrices too small to fill a GPU, where the
// time goes into latency and every launch counts. The factors come from functors, so that they can be formed on the
// way.
#pragma once

#include "common/device.h"
#include "common/four.cuh"

namespace fewshot_ext {

// The block's 256 threads form four groups. Each takes a quarter of every slab of the inner dimension and computes all
// of the tile, 4 x 4 results a thread; the quarters are added up at the end. With one tile a multiprocessor this keeps
// four times as many warps busy as a thread for each 4 x 4 results would. A stage of several slabs is on its way from
// memory while the one before is computed: the memory answers after about as long as two slabs take.
struct TileProduct {
  static constexpr int tile = 32, slab = 32, threads = 256;
  static constexpr int groups = 4, group_threads = threads / groups;

  template <class T>
  static constexpr int slabs = sizeof(T) == 4 ? 2 : 1;  // of a stage; 48 KiB of shared memory hold no more

  template <class T>
  struct Memory {
    alignas(Four<T>) T at[2 * 2 * slabs<T> * slab * tile];  // two stages of both factors; at the end the groups' sums
  };

  // A slab lies in shared memory with its inner dimension k outermost. Fours of columns are permuted within each row k,
  // by which neither rows nor columns written in fours, nor reads of one k, meet in a bank.
  __device__ static __forceinline__ int place(int k, int column) {
    return k * tile + (((column / 4) ^ (k / 4)) % 8) * 4 + column % 4;
  }

  // The thread's place when it loads four elements of a factor, and in the result.
  __device__ static __forceinline__ int line() { return threadIdx.x / 8; }
  __device__ static __forceinline__ int first() { return threadIdx.x % 8 * 4; }

  // sum over k < depth of a[m][k] b[k][n]; the thread gets row line() and columns first()..first() + 3.
  //
  // A loader is called for each slab of 32 in order, with its first k, by all threads together. It returns four
  // elements, zeros beyond depth, where a last call may lie as a whole. With Loader::along_k they are those of column
  // line() for k + first()...; otherwise those of k + line() for columns first()....
  template <class T, class LoadA, class LoadB>
  __device__ static Four<T> multiply(int depth, LoadA&& load_a, LoadB&& load_b, T* memory) {
    const int group = threadIdx.x / group_threads, in_group = threadIdx.x % group_threads;
    const int row = in_group % 8 * 4, column = in_group / 8 * 4;
    T sum[4][4] = {};

    constexpr int stage_slabs = slabs<T>, stage_depth = stage_slabs * slab, factor = stage_slabs * slab * tile;
    Four<T> a[stage_slabs], b[stage_slabs];
    const auto load = [&](int k) {
#pragma unroll
      for (int s = 0; s < stage_slabs; ++s) {
        a[s] = load_a(k + s * slab);
        b[s] = load_b(k + s * slab);
      }
    };
    const auto put_stage = [&](T* to) {
#pragma unroll
      for (int s = 0; s < stage_slabs; ++s) {
        put<LoadA>(to + s * slab * tile, a[s]);
        put<LoadB>(to + factor + s * slab * tile, b[s]);
      }
    };

    load(0);
    put_stage(memory);
    __syncthreads();
    int stage = 0;
    for (int k = 0; k < depth; k += stage_depth) {
      const bool more = k + stage_depth < depth;
      if (more) load(k + stage_depth);
      const T* in_a = memory + stage * 2 * factor;
      const T* in_b = in_a + factor;
#pragma unroll
      for (int s = 0; s < stage_slabs; ++s) {
#pragma unroll
        for (int i = 0; i < slab / groups; ++i) {
          const int inner = group * (slab / groups) + i;
          const Four<T> left = Four<T>::read(in_a + s * slab * tile + place(inner, row));
          const Four<T> right = Four<T>::read(in_b + s * slab * tile + place(inner, column));
#pragma unroll
          for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int c = 0; c < 4; ++c) sum[r][c] += left.at[r] * right.at[c];
        }
      }
      stage ^= 1;
      if (more) put_stage(memory + stage * 2 * factor);
      __syncthreads();
    }

#pragma unroll
    for (int r = 0; r < 4; ++r)
      Four<T>{{sum[r][0], sum[r][1], sum[r][2], sum[r][3]}}.write(memory + group * tile * tile +
                                                                  place(row + r, column));
    __syncthreads();
    Four<T> result{};
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      const Four<T> part = Four<T>::read(memory + g * tile * tile + place(line(), first()));
#pragma unroll
      for (int c = 0; c < 4; ++c) result.at[c] += part.at[c];
    }
    __syncthreads();
    return result;
  }

 private:
  template <class Loader, class T>
  __device__ static __forceinline__ void put(T* memory, const Four<T>& values) {
    if constexpr (std::remove_reference_t<Loader>::along_k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) memory[place(first() + i, line())] = values.at[i];
    } else {
      values.write(memory + place(line(), first()));
    }
  }
};

// Loader of a factor that lies in global memory as rows of `columns` elements.
template <class Storage, bool along>
struct LoadMatrix {
  static constexpr bool along_k = along;
  using T = Accumulate<Storage>;

  const Storage* matrix;  // [rows, columns], rows `stride` elements apart
  int64_t stride;
  int rows, columns;
  int first_row, first_column;  // of the tile, in the dimension that is not k
  bool fours;

  // along_k: the tile's columns m or n are rows of the matrix. Otherwise the matrix has k as its rows.
  __device__ __forceinline__ Four<T> operator()(int k) const {
    const int row = (along ? first_row : k) + TileProduct::line();
    const int column = (along ? k : first_column) + TileProduct::first();
    const int count = row < rows ? columns - column : 0;
    return load_four(matrix + row * stride + column, count, fours);
  }
};

}  // namespace fewshot_ext
