// Products of 32 x 32 tiles by one block: for matrices too small to fill a GPU, where the time goes into latency and
// every launch counts. The factors come from functors, so that they can be formed on the way.
#pragma once

#include "common/device.h"
#include "common/four.cuh"

namespace fewshot_ext {

// How a block's threads share a tile, whatever multiplies it. A factor is handed over in slabs: all of the tile for 32
// of the inner dimension k, four elements a thread.
//
// A loader has the slabs from k on in two steps, so that one stage of slabs can be on its way from memory while another
// is multiplied:
//
//   Fetched fetch(int k)                    reads memory and does nothing else with what it has read
//   Four<T> form(const Fetched&)            the elements; called for each slab in order, by all threads together
//
// Elements beyond the matrix are zeros, where the last slabs may lie as a whole. With Loader::along_k the four are
// those of column line() for k + first() and on; otherwise those of k + line() for columns first() and on.
struct Tile {
  static constexpr int size = 32, slab = 32, threads = 256;

  // The thread's place when it loads four elements of a factor, and in the result.
  __device__ static __forceinline__ int line() { return threadIdx.x / 8; }
  __device__ static __forceinline__ int first() { return threadIdx.x % 8 * 4; }
};

// The slabs of one stage, of one factor.
template <class Loader, int slabs>
struct Stage {
  typename Loader::Fetched fetched[slabs];

  __device__ __forceinline__ void fetch(Loader& loader, int k) {
#pragma unroll
    for (int s = 0; s < slabs; ++s) fetched[s] = loader.fetch(k + s * Tile::slab);
  }
};

// In plain fused multiply-adds. The block's threads form four groups. Each takes a quarter of every slab and computes
// all of the tile, 4 x 4 results a thread; the quarters are added up at the end. With one tile a multiprocessor this
// keeps four times as many warps busy as a thread for each 4 x 4 results would.
template <class T>
struct PlainTileProduct {
  static constexpr int groups = 4, group_threads = Tile::threads / groups;
  static constexpr int slabs = sizeof(T) == 4 ? 2 : 1;  // of a stage; 48 KiB of shared memory hold no more
  static constexpr int depth = slabs * Tile::slab;
  static constexpr int factor = depth * Tile::size;  // elements

  struct Memory {
    alignas(Four<T>) T at[2 * 2 * factor];  // two stages of both factors; at the end the groups' sums
  };

  // A slab lies in shared memory with k outermost. Fours of columns are permuted within each row k, by which neither
  // rows nor columns written in fours, nor reads of one k, meet in a bank.
  __device__ static __forceinline__ int place(int k, int column) {
    return k * Tile::size + (((column / 4) ^ (k / 4)) % 8) * 4 + column % 4;
  }

  // sum over begin <= k < end of a[m][k] b[k][n], for a multiple of 32 of `depth` or up to the last of k; the thread
  // gets row line() and columns first()..first() + 3.
  template <class LoadA, class LoadB>
  __device__ static Four<T> multiply(int begin, int end, LoadA& load_a, LoadB& load_b, T* memory) {
    const int group = threadIdx.x / group_threads, in_group = threadIdx.x % group_threads;
    const int row = in_group % 8 * 4, column = in_group / 8 * 4;
    T sum[4][4] = {};

    Stage<LoadA, slabs> a;
    Stage<LoadB, slabs> b;
    const auto put_stage = [&](T* to) {
#pragma unroll
      for (int s = 0; s < slabs; ++s) {
        put<LoadA>(to + s * Tile::slab * Tile::size, load_a.form(a.fetched[s]));
        put<LoadB>(to + factor + s * Tile::slab * Tile::size, load_b.form(b.fetched[s]));
      }
    };

    a.fetch(load_a, begin);
    b.fetch(load_b, begin);
    put_stage(memory);
    __syncthreads();
    int stage = 0;
    for (int k = begin; k < end; k += depth) {
      const bool more = k + depth < end;
      if (more) {
        a.fetch(load_a, k + depth);
        b.fetch(load_b, k + depth);
      }
      const T* in_a = memory + stage * 2 * factor;
      const T* in_b = in_a + factor;
#pragma unroll
      for (int s = 0; s < slabs; ++s) {
#pragma unroll
        for (int i = 0; i < Tile::slab / groups; ++i) {
          const int inner = group * (Tile::slab / groups) + i;
          const Four<T> left = Four<T>::read(in_a + s * Tile::slab * Tile::size + place(inner, row));
          const Four<T> right = Four<T>::read(in_b + s * Tile::slab * Tile::size + place(inner, column));
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
      Four<T>{{sum[r][0], sum[r][1], sum[r][2], sum[r][3]}}.write(memory + group * Tile::size * Tile::size +
                                                                  place(row + r, column));
    __syncthreads();
    Four<T> result{};
#pragma unroll
    for (int g = 0; g < groups; ++g) {
      const Four<T> part = Four<T>::read(memory + g * Tile::size * Tile::size + place(Tile::line(), Tile::first()));
#pragma unroll
      for (int c = 0; c < 4; ++c) result.at[c] += part.at[c];
    }
    __syncthreads();
    return result;
  }

 private:
  template <class Loader>
  __device__ static __forceinline__ void put(T* memory, const Four<T>& values) {
    if constexpr (Loader::along_k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) memory[place(Tile::first() + i, Tile::line())] = values.at[i];
    } else {
      values.write(memory + place(Tile::line(), Tile::first()));
    }
  }
};

// Loader of a factor that lies in global memory as rows of `columns` elements.
template <class Storage, bool along>
struct LoadMatrix {
  static constexpr bool along_k = along;
  static constexpr bool fits_tf32 = sizeof(Storage) == 2;  // whatever the elements, none has more bits than tf32
  using Fetched = Four<Storage>;

  const Storage* matrix;  // [rows, columns], rows `stride` elements apart
  int64_t stride;
  int rows, columns;
  int first_row, first_column;  // of the tile, in the dimension that is not k
  bool fours;

  // along_k: the tile's columns m or n are rows of the matrix. Otherwise the matrix has k as its rows.
  __device__ __forceinline__ Fetched fetch(int k) const {
    const int row = (along ? first_row : k) + Tile::line();
    const int column = (along ? k : first_column) + Tile::first();
    return fetch_four(matrix + row * stride + column, row < rows ? columns - column : 0, fours);
  }

  __device__ __forceinline__ auto form(const Fetched& fetched) const { return accumulate_four(fetched); }
};

}  // namespace fewshot_ext
