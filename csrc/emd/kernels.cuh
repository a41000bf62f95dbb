// Kernels of the Earth Mover's Distance: a warp for a small problem, a block for a larger one.
#pragma once

#include "emd/device_solve.cuh"

namespace fewshot_ext {

struct EmdWarps {
  using Team = fewshot_ext::Team<warp_lanes, 64>;
  static constexpr int warps = 4, threads = warps * warp_lanes;
  static constexpr int blocks_of_processor = 7;  // 72 registers a thread
  static bool take(int64_t n, int64_t m) { return n + m <= Team::nodes; }
};

// A warp each, without barriers of the block.
template <class Storage>
__global__ void __launch_bounds__(EmdWarps::threads, EmdWarps::blocks_of_processor)
    emd_by_warps(const __grid_constant__ EmdProblemOf<Storage> p) {
  using T = Accumulate<Storage>;
  using Solve = emd_device::Solve<Storage, EmdWarps::Team>;
  struct Memory {
    typename Solve::Memory solve;
    alignas(16) T cost[CostByColumns<T>::most_cells(EmdWarps::Team::nodes)];
  };
  FEWSHOT_EXT_SHARED(Memory, memory, [EmdWarps::warps]);

  const auto index = [] { return int64_t(blockIdx.x) * EmdWarps::warps + threadIdx.x / warp_lanes; };
  if (index() >= p.batch) return;
  emd_device::in_steps([&] {
    Memory& own = memory[threadIdx.x / warp_lanes];
    return Solve(p, index(), own.solve, own.cost);
  });
}

template <int most_nodes>
struct EmdBlock {
  using Team = fewshot_ext::Team<most_nodes, most_nodes>;
  static constexpr int blocks_of_processor = most_nodes <= 128 ? 6 : 2;  // at least 64 registers a thread
  static constexpr int64_t most_of_a_side = most_nodes < 256 ? most_nodes : 256;

  static bool take(int64_t n, int64_t m) { return n + m <= most_nodes && n <= most_of_a_side && m <= most_of_a_side; }
};

// A block each.
template <class Storage, int most_nodes>
__global__ void __launch_bounds__(most_nodes, EmdBlock<most_nodes>::blocks_of_processor)
    emd_by_blocks(const __grid_constant__ EmdProblemOf<Storage> p) {
  using T = Accumulate<Storage>;
  using Solve = emd_device::Solve<Storage, typename EmdBlock<most_nodes>::Team>;
  using Memory = typename Solve::Memory;
  FEWSHOT_EXT_SHARED(Memory, memory, );

  // The flow is what is written last: until then its place is that of the costs.
  emd_device::in_steps([&] {
    T* const copy = p.flow + int64_t(blockIdx.x) * p.suppliers * p.consumers;
    return Solve(p, blockIdx.x, memory, copy);
  });
}

}  // namespace fewshot_ext
