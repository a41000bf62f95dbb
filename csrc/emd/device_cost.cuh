// The costs of a problem: where the caller has them, and the copy that a team of threads of a GPU solves it with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/four.cuh"
#include "common/host_device.h"
#include "emd/problem.h"

namespace fewshot_ext {

template <class Storage>
using EmdProblemOf = EmdProblem<Storage, Accumulate<Storage>>;

// Costs where the caller has them.
template <class Storage>
struct GlobalCost {
  const Storage* at;
  int64_t row_stride, column_stride;

  __device__ __forceinline__ GlobalCost(const EmdProblemOf<Storage>& p, int64_t index)
      : at(p.cost + index * p.cost_strides[0]), row_stride(p.cost_strides[1]), column_stride(p.cost_strides[2]) {}

  __device__ __forceinline__ Accumulate<Storage> operator()(int i, int j) const {
    return to_accumulate(at[i * row_stride + j * column_stride]);
  }
};

// A copy of those between points that have mass, as large teams have it, in global memory.
template <class T>
struct CostByRows {
  T* at;
  int row_stride;

  __device__ __forceinline__ CostByRows(T* copy, int, int columns) : at(copy), row_stride(columns) {}
  FEWSHOT_EXT_HOST_DEVICE static constexpr int filled_rows(int rows) { return rows; }
  __device__ __forceinline__ T& operator()(int i, int j) const { return at[i * row_stride + j]; }
};

// The same for a warp, in shared memory. Each lane reads down a column, 16 bytes at a time: columns are filled up to a
// multiple of four rows, a window at least, and start an odd number of 16 bytes apart, so that lanes that are served
// together do not meet in a bank.
template <class T>
struct CostByColumns {
  static constexpr int window = sizeof(T) == 8 ? 8 : 16;

  T* at;
  int column_stride;

  __device__ __forceinline__ CostByColumns(T* copy, int rows, int) : at(copy), column_stride(stride(rows)) {}

  FEWSHOT_EXT_HOST_DEVICE static constexpr int filled_rows(int rows) {
    return rows > window ? (rows + 3) & ~3 : window;
  }
  FEWSHOT_EXT_HOST_DEVICE static constexpr int stride(int rows) { return filled_rows(rows) | (16 / sizeof(T)); }

  // What the costs of any problem with that many nodes take.
  static constexpr int most_cells(int nodes) {
    int most = 0;
    for (int rows = 1; rows < nodes; ++rows) most = std::max(most, stride(rows) * (nodes - rows));
    return most;
  }

  __device__ __forceinline__ T& operator()(int i, int j) const { return at[j * column_stride + i]; }
  // Of rows i to i + 3, i a multiple of 4.
  __device__ __forceinline__ Four<T> four(int i, int j) const { return Four<T>::read(at + j * column_stride + i); }
};

template <class T, class Team>
using CopiedCost = std::conditional_t<Team::warps == 1, CostByColumns<T>, CostByRows<T>>;

}  // namespace fewshot_ext
