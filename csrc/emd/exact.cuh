// The problems of a batch that arithmetic in double could not prove, solved without rounding by a warp each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "common/reduce.cuh"
#include "emd/device_solve.cuh"

#define FEWSHOT_EXT_ISA gpu
#include "emd/exact_solver.h"

namespace fewshot_ext {
namespace gpu {

// What ExactSimplex runs on: the lanes of a warp, and a piece of memory that is large enough for any costs and masses.
class Warp {
 public:
  static constexpr int lanes = warp_lanes;

  FEWSHOT_EXT_HOST_DEVICE Warp(unsigned char* memory) : memory_(memory) {}

  __device__ int lane() const { return static_cast<int>(threadIdx.x) % warp_lanes; }
  __device__ bool stopped() const { return false; }
  __device__ unsigned char* memory(int64_t) const { return memory_; }

  template <class Work>
  __device__ void one(const Work& work) const {
    __syncwarp(all_lanes);
    if (lane() == 0) work();
    __syncwarp(all_lanes);
  }

  template <class T>
  __device__ T least(T value) const {
    return warp_reduce(value, [](T a, T b) { return b < a ? b : a; });
  }

  // The lowest of what the lanes have found, each in a column of its own or in none, -1.
  __device__ void agree(Scaled& lowest, int64_t& column) const {
    const Scaled own = lowest;
    const int64_t own_column = column;
    column = -1;
    for (int k = 0; k < lanes; ++k) {
      const Scaled found{__shfl_sync(all_lanes, own.mantissa, k), __shfl_sync(all_lanes, own.exponent, k)};
      const int64_t found_column = __shfl_sync(all_lanes, own_column, k);
      if (found_column < 0 || (column >= 0 && !is_lower(found, lowest))) continue;
      lowest = found;
      column = found_column;
    }
  }

  template <bool forbids, class Float>
  __device__ double lowest_of_row(const ExactRow<Float>& row) const {
    constexpr double most = std::numeric_limits<double>::max();
    double lowest = std::numeric_limits<double>::infinity();
    for (int64_t j = lane(); j < row.count; j += lanes) {
      const double given = row.cost[j], v = row.columns[j];
      const bool banned = forbids && given > row.limit;
      const double c = banned ? 0 : given;
      const int level = forbids ? row.levels[j] - row.level + banned : 0;
      const double error = row.factor * (std::abs(c) + std::abs(row.dual) + std::abs(v)) + row.constant;
      const double high = level < 0 ? -most : level > 0 ? most : (c - row.dual) + v + error;
      lowest = high < lowest ? high : lowest;
    }
    return least(lowest);
  }

 private:
  unsigned char* memory_;
};

// Lives in global memory, one for all lanes.
template <class Storage>
class Solver : private ExactSolver<Storage, Accumulate<Storage>, Warp> {
  using T = Accumulate<Storage>;
  using Base = ExactSolver<Storage, T, Warp>;

 public:
  FEWSHOT_EXT_HOST_DEVICE explicit Solver(const EmdProblemOf<Storage>& problem) : Base(problem) {}

  // What a warp needs for a problem, itself included.
  FEWSHOT_EXT_HOST_DEVICE static int64_t bytes(const EmdProblemOf<Storage>& problem) {
    BitRange numbers;
    numbers.include(std::numeric_limits<T>::denorm_min());
    numbers.include(std::numeric_limits<T>::max());
    const int64_t n = problem.suppliers, m = problem.consumers;
    return own_bytes(problem) + Base::Exact::most_bytes(n, m, m, numbers);
  }

  // By all lanes; `memory` has room for what bytes() says, and this stands at its beginning.
  __device__ void solve(int64_t index, unsigned char* memory) {
    Warp warp(memory + own_bytes(problem_));
    const int32_t state = problem_.pivots[index];
    warp.one([&] {
      ByteArena arena{{memory + room_for_this}};
      Base::lay_out(arena);
      Base::open(index);
      // The flow is written last: until then its place is that of the costs.
      cost_ = problem_.flow + index * n_ * m_;
      EmdFailure unused;
      fault_ = Base::load_masses(unused);
    });
    if (fault_ == EmdFault::none) load_costs(warp);
    EmdFault found = fault_;
    if (found == EmdFault::none) found = Base::solve_exactly(warp, [&] { start(state); });
    warp.one([&] { fault_ = found == EmdFault::none && !Base::write() ? EmdFault::overflow : found; });
    if (fault_ != EmdFault::none)
      emd_device::poison<Storage>(problem_, index, -static_cast<int32_t>(fault_), warp.lane(), warp_lanes);
  }

 private:
  using Base::column_count_, Base::columns_, Base::cost_, Base::cost_exponent_, Base::forbids_, Base::largest_cost_,
      Base::m_, Base::n_, Base::partner_, Base::pivots_, Base::problem_, Base::row_count_, Base::rows_, Base::stride_;

  static constexpr int64_t room_for_this = 1024;

  FEWSHOT_EXT_HOST_DEVICE static int64_t own_bytes(const EmdProblemOf<Storage>& problem) {
    static_assert(sizeof(Solver) <= room_for_this);
    Solver sizes(problem);
    ByteArena arena{};
    sizes.Base::lay_out(arena);
    return room_for_this + arena.bytes.used;
  }

  // Those between points that have mass, and a stand-in for infinity. But all are looked at.
  __device__ void load_costs(const Warp& warp) {
    constexpr T most = std::numeric_limits<T>::max();
    T lowest = 0;  // - |cost|
    int good = 1, finite = 1;
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = warp.lane(); j < m_; j += warp_lanes) good &= Base::cost_of(i, j) >= -double(most);
    for (int64_t i = 0; i < row_count_; ++i) {
      for (int64_t j = warp.lane(); j < column_count_; j += warp_lanes) {
        const T c = static_cast<T>(Base::cost(i, j));
        cost_[i * column_count_ + j] = c;
        finite &= c <= most;
        if (c <= most) lowest = std::min(lowest, -std::abs(c));
      }
    }
    good = warp.least(good);
    finite = warp.least(finite);
    lowest = warp.least(lowest);
    warp.one([&] {
      if (!good) fault_ = EmdFault::cost;
      stride_ = column_count_;
      forbids_ = !finite;
      largest_cost_ = -lowest;
      cost_exponent_ = 0;
      // Sums of costs must not overflow.
      if (largest_cost_ > most / (1 << 18)) Base::scale_costs();
      if (forbids_) Base::forbid_arcs();
    });
  }

  // From the tree that the first kernel left, if it did.
  __device__ void start(int32_t state) {
    pivots_ = 0;
    if (state == emd_unsolved) return;
    pivots_ = emd_unsolved - 1 - state;
    int32_t* const place = partner_;  // of a point among those that have mass
    for (int64_t k = 0; k < row_count_; ++k) place[rows_[k]] = static_cast<int32_t>(k);
    for (int64_t k = 0; k < column_count_; ++k) place[n_ + columns_[k]] = static_cast<int32_t>(k);
    for (int64_t k = row_count_ + column_count_ - 2; k >= 0; --k) {
      const int64_t cell = Base::basis_[k];
      Base::serve_if_open(place[cell / m_], place[n_ + cell % m_]);
    }
  }

  EmdFault fault_ = EmdFault::none;
};

}  // namespace gpu

struct EmdExactly {
  static constexpr int threads = warp_lanes;
  static constexpr int64_t most_warps = 512, most_bytes = int64_t(64) << 20;
};

// For problems that are too large for the others.
template <class Storage>
__global__ void __launch_bounds__(256) emd_leave_to_exact(const __grid_constant__ EmdProblemOf<Storage> p) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < p.batch) p.pivots[index] = emd_unsolved;
}

// Each warp looks for what is left unsolved, and has `bytes` of `memory` to itself.
template <class Storage>
__global__ void __launch_bounds__(EmdExactly::threads)
    emd_exactly_by_warps(const __grid_constant__ EmdProblemOf<Storage> p, unsigned char* memory, int64_t bytes) {
  using Solver = gpu::Solver<Storage>;
  const int lane = static_cast<int>(threadIdx.x);
  unsigned char* const own = memory + blockIdx.x * bytes;
  for (int64_t first = blockIdx.x; first < p.batch; first += int64_t(gridDim.x) * warp_lanes) {
    const int64_t index = first + int64_t(gridDim.x) * lane;
    const bool unsolved = index < p.batch && p.pivots[index] <= emd_unsolved;
    for (unsigned rest = __ballot_sync(all_lanes, unsolved); rest != 0; rest &= rest - 1) {
      auto* const solver = reinterpret_cast<Solver*>(own);
      if (lane == 0) ::new (solver) Solver(p);
      __syncwarp(all_lanes);
      solver->solve(first + int64_t(gridDim.x) * (__ffs(static_cast<int>(rest)) - 1), own);
      __syncwarp(all_lanes);
    }
  }
}

}  // namespace fewshot_ext
