// Kernels of the Earth Mover's Distance: a warp for a small problem, a block for a larger one.
#pragma once

#include "emd/device_simplex.cuh"
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

// A copy in shared memory.
template <class T>
struct SharedCost {
  const T* at;
  int row_stride;

  __device__ __forceinline__ T operator()(int i, int j) const { return at[i * row_stride + j]; }
};

namespace emd_device {

// Sums over a warp, the same in every warp of a team.
template <class Value>
__device__ __forceinline__ double sum(int count, Value value) {
  double total = 0;
  for (int k = static_cast<int>(threadIdx.x) % warp_lanes; k < count; k += warp_lanes) total += value(k);
  return warp_sum(total);
}

// Bits of numbers that are not negative are in the order of the numbers; infinity and NaN come last.
template <class T>
__device__ __forceinline__ uint64_t magnitude_bits(T x) {
  if constexpr (sizeof(T) == 8)
    return bit_cast<uint64_t>(x) & 0x7fffffffffffffffull;
  else
    return bit_cast<uint32_t>(x) & 0x7fffffffu;
}

template <class T>
__device__ __forceinline__ T from_magnitude_bits(uint64_t bits) {
  if constexpr (sizeof(T) == 8)
    return bit_cast<T>(bits);
  else
    return bit_cast<T>(static_cast<uint32_t>(bits));
}

struct Masses {
  double supply, demand;

  __device__ __forceinline__ bool agree() const {
    const double larger = max(supply, demand);
    return supply > 0 && demand > 0 && larger <= std::numeric_limits<double>::max() &&
           std::abs(supply - demand) <= emd_mass_tolerance * larger;
  }
};

// Problem `index` of a batch, solved by a team.
template <class Storage, class Team, class Cost>
class Solve {
  using T = Accumulate<Storage>;
  using Simplex = DeviceSimplex<T, Team, Cost>;

 public:
  using Memory = typename Simplex::Memory;

  __device__ __forceinline__ Solve(const EmdProblemOf<Storage>& problem, int64_t index, Memory& memory,
                                   const Cost& cost)
      : p_(problem),
        n_(static_cast<int>(problem.suppliers)),
        m_(static_cast<int>(problem.consumers)),
        index_(index),
        memory_(memory),
        cost_(cost),
        simplex_(memory, cost, n_, m_) {}

  // `cost_bits`: the greatest magnitude_bits among the thread's share of the costs.
  __device__ __forceinline__ void run(uint64_t cost_bits) {
    const bool good_masses = load_masses();
    cost_bits = simplex_.team.max(good_masses ? cost_bits : ~uint64_t(0));
    constexpr uint64_t infinity = sizeof(T) == 8 ? 0x7ff0000000000000ull : 0x7f800000ull;
    const Masses masses = add_up_masses();
    const bool solved = cost_bits < infinity && masses.agree() &&
                        simplex_.solve(masses.supply, masses.demand, from_magnitude_bits<T>(cost_bits)) && write();
    if (!solved) poison();
  }

 private:
  static constexpr T nan = std::numeric_limits<T>::quiet_NaN();

  __device__ __forceinline__ T* flow() const { return p_.flow + index_ * n_ * m_; }
  __device__ __forceinline__ int32_t* basis() const { return p_.basis + index_ * (n_ + m_ - 1); }

  // False where one of the thread's masses is negative or not finite.
  __device__ __forceinline__ bool load_masses() {
    const Storage* supply = p_.supply + index_ * p_.supply_strides[0];
    const Storage* demand = p_.demand + index_ * p_.demand_strides[0];
    bool good = true;
    for (int v = simplex_.team.thread(); v < n_ + m_; v += Team::threads) {
      const double mass =
          to_accumulate(v < n_ ? supply[v * p_.supply_strides[1]] : demand[(v - n_) * p_.demand_strides[1]]);
      good &= mass >= 0 && mass <= std::numeric_limits<double>::max();
      memory_.scratch[v] = mass;
    }
    simplex_.team.sync();
    return good;
  }

  __device__ __forceinline__ Masses add_up_masses() const {
    return {sum(n_, [this](int i) { return memory_.scratch[i]; }),
            sum(m_, [this](int j) { return memory_.scratch[n_ + j]; })};
  }

  // False if a flow is negative by more than the rounding of the masses explains, or a dual is not finite.
  __device__ __forceinline__ bool write() {
    for (int cell = simplex_.team.thread(); cell < n_ * m_; cell += Team::threads) flow()[cell] = 0;
    load_masses();
    const Masses masses = add_up_masses();  // again, instead of registers that hold them all the while
    simplex_.move_root();

    double flows[Team::nodes_each];
    double lowest = 0;
    const double match = masses.supply / masses.demand;
    simplex_.each_slot([&](int s, int slot, Arc arc) {
      const bool supplier_is_child = simplex_.supplier_is_child(slot, arc);
      double of_suppliers = 0, of_consumers = 0;
      for (int i = 0; i < n_; ++i) of_suppliers += simplex_.on_path(slot, i) ? memory_.scratch[i] : 0;
      for (int j = n_; j < n_ + m_; ++j) of_consumers += simplex_.on_path(slot, j) ? memory_.scratch[j] : 0;
      const double surplus = of_suppliers - match * of_consumers;
      const double moved = supplier_is_child ? surplus : -surplus;
      lowest = moved < lowest ? moved : lowest;
      const bool any = memory_.scratch[arc.supplier] > 0 && memory_.scratch[n_ + arc.consumer] > 0;
      flows[s] = any && moved > 0 ? moved : 0;

      const int child = supplier_is_child ? arc.supplier : n_ + arc.consumer;
      int depth = 0;
      for (int w = 0; w < Memory::words; ++w) depth += __popc(memory_.path[w][child]);
      memory_.arc[slot] = depth;
    });
    const double rounding = (n_ + m_) * (1 / double(int64_t(1) << Simplex::mass_bits) + 0x1p-52);
    // Sums of costs that leave the range of a double would pass any comparison.
    uint64_t deficit_bits = magnitude_bits(lowest);
    for (int v = simplex_.team.thread(); v < n_ + m_; v += Team::threads)
      if (!(std::abs(memory_.potential[v]) <= std::numeric_limits<double>::max())) deficit_bits = ~uint64_t(0);
    const double deficit = from_magnitude_bits<double>(simplex_.team.max(deficit_bits));
    simplex_.team.sync();
    if (!(deficit <= rounding * masses.supply)) return false;

    simplex_.each_slot([&](int s, int slot, Arc arc) {
      const int depth = memory_.arc[slot];
      int position = 0;
      for (int k = 0; k < n_ + m_ - 1; ++k) position += memory_.arc[k] < depth + (k < slot);
      const int cell = arc.supplier * m_ + arc.consumer;
      const double moved = flows[s];
      basis()[position] = cell;
      flow()[cell] = static_cast<T>(moved);
      memory_.scratch[slot] = moved * double(cost_(arc.supplier, arc.consumer));
    });
    write_duals();
    simplex_.team.sync();
    const double value = sum(n_ + m_ - 1, [this](int slot) { return memory_.scratch[slot]; });
    if (simplex_.team.thread() == 0) {
      p_.value[index_] = static_cast<T>(value);
      p_.pivots[index_] = simplex_.pivots();
    }
    return true;
  }

  __device__ __forceinline__ void write_duals() {
    const double mean_u = sum(n_, [this](int i) { return memory_.potential[i]; }) / n_;
    const double mean_v = -sum(m_, [this](int j) { return memory_.potential[n_ + j]; }) / m_;
    const double shift = (mean_v - mean_u) / 2;
    for (int i = simplex_.team.thread(); i < n_; i += Team::threads)
      p_.supply_dual[index_ * n_ + i] = static_cast<T>(memory_.potential[i] + shift);
    for (int j = simplex_.team.thread(); j < m_; j += Team::threads)
      p_.demand_dual[index_ * m_ + j] = static_cast<T>(-memory_.potential[n_ + j] - shift);
  }

  // No numbers, and a tree that keeps the backward pass in bounds.
  __device__ __forceinline__ void poison() {
    for (int cell = simplex_.team.thread(); cell < n_ * m_; cell += Team::threads) flow()[cell] = nan;
    for (int i = simplex_.team.thread(); i < n_; i += Team::threads) p_.supply_dual[index_ * n_ + i] = nan;
    for (int j = simplex_.team.thread(); j < m_; j += Team::threads) p_.demand_dual[index_ * m_ + j] = nan;
    for (int k = simplex_.team.thread(); k < n_ + m_ - 1; k += Team::threads)
      basis()[k] = k < m_ ? k : (k - m_ + 1) * m_;
    if (simplex_.team.thread() == 0) {
      p_.value[index_] = nan;
      p_.pivots[index_] = 0;
    }
  }

  const EmdProblemOf<Storage>& p_;
  const int n_, m_;
  const int64_t index_;
  Memory& memory_;
  const Cost cost_;
  Simplex simplex_;
};

}  // namespace emd_device

struct EmdWarps {
  using Team = fewshot_ext::Team<warp_lanes, 64>;
  static constexpr int warps = 4, threads = warps * warp_lanes;
  static constexpr int blocks_of_processor = 8;  // 64 registers a thread
  static constexpr int most_cells = Team::nodes / 2 * (Team::nodes / 2 + 1);

  // Odd, so that neither rows nor columns meet in a bank.
  __host__ __device__ static constexpr int row_stride(int m) { return m | 1; }

  static bool take(int64_t n, int64_t m) { return n + m <= Team::nodes; }
};

// A warp each, without barriers of the block.
template <class Storage>
__global__ void __launch_bounds__(EmdWarps::threads, EmdWarps::blocks_of_processor)
    emd_by_warps(const __grid_constant__ EmdProblemOf<Storage> p) {
  using T = Accumulate<Storage>;
  using Solve = emd_device::Solve<Storage, EmdWarps::Team, SharedCost<T>>;
  struct Memory {
    typename Solve::Memory solve;
    T cost[EmdWarps::most_cells];
  };
  FEWSHOT_EXT_SHARED(Memory, memory, [EmdWarps::warps]);

  const int warp = static_cast<int>(threadIdx.x) / warp_lanes, lane = static_cast<int>(threadIdx.x) % warp_lanes;
  const int64_t index = int64_t(blockIdx.x) * EmdWarps::warps + warp;
  if (index >= p.batch) return;

  Memory& own = memory[warp];
  const int n = static_cast<int>(p.suppliers), m = static_cast<int>(p.consumers);
  const int row_stride = EmdWarps::row_stride(m);
  const GlobalCost<Storage> from(p, index);
  uint64_t bits = 0;
  for (int j = lane; j < m; j += warp_lanes) {
#pragma unroll 8
    for (int i = 0; i < n; ++i) {
      const T cost = from(i, j);
      own.cost[i * row_stride + j] = cost;
      bits = max(bits, emd_device::magnitude_bits(cost));
    }
  }
  const SharedCost<T> cost{own.cost, row_stride};
  Solve(p, index, own.solve, cost).run(bits);
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
  using Team = typename EmdBlock<most_nodes>::Team;
  using Solve = emd_device::Solve<Storage, Team, GlobalCost<Storage>>;
  using Memory = typename Solve::Memory;
  FEWSHOT_EXT_SHARED(Memory, memory, );

  const int n = static_cast<int>(p.suppliers), m = static_cast<int>(p.consumers);
  const GlobalCost<Storage> cost(p, blockIdx.x);
  uint64_t bits = 0;
  for (int i = static_cast<int>(threadIdx.x) / warp_lanes; i < n; i += Team::warps)
    for (int j = static_cast<int>(threadIdx.x) % warp_lanes; j < m; j += warp_lanes)
      bits = max(bits, emd_device::magnitude_bits(cost(i, j)));
  Solve(p, blockIdx.x, memory, cost).run(bits);
}

}  // namespace fewshot_ext
