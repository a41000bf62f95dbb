// The basis of a transportation problem that a team of threads of a GPU solves, and the first one.
//
// A basis is a spanning tree of suppliers 0 .. n - 1 and consumers n .. n + m - 1. Its arcs have slots 0 .. n + m - 2,
// and each node keeps the set of slots on its way to the root. When the arc (i, j) enters,
//
//   the cycle            is path(i) ^ path(j),
//   the subtree cut off  are the nodes whose path has the slot that leaves, and
//   their new paths      are path ^ cycle without that slot, for the entering arc takes it over,
//
// so that all threads take part in a pivot, each for its own nodes and slots, and none has to walk along the tree.
//
// Flows are integers: masses are scaled to the full width, and every supply is raised by one unit of a finer grid, at
// the expense of one demand. With that perturbation no basic flow is ever 0, so each pivot lowers the objective
// whatever the ties in the data, no sequence of pivots comes back to a basis, and no two arcs compete for leaving it.
// Where there are dummies, which take what the other side has more of, the last demand is the one that pays.
#pragma once

#include <limits>
#include <type_traits>

#include "emd/team.cuh"

namespace fewshot_ext {

struct Arc {
  int supplier, consumer;
};

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

// Price is what reduced costs are computed in while many arcs are looked at.
template <class Price, class Team>
struct SimplexMemory {
  static constexpr int nodes = Team::nodes, words = nodes / warp_lanes;
  struct Rounded {
    alignas(16) Price at[nodes];
  };
  struct None {};

  typename Team::Memory team;
  union {
    alignas(16) double potential[nodes];  // u of suppliers, -v of consumers
    int64_t first_flow[nodes];            // of slots, until the threads take them over
    int above[nodes];                     // where the path of a node ends as far as it is known
  };
  double scratch[nodes];
  std::conditional_t<std::is_same_v<Price, double>, None, Rounded> price;  // potentials
  uint32_t path[words][nodes];                                             // bit s of word w: slot 32 w + s
  uint32_t cycle[words];
  int arc[nodes];
  double largest_cost;
  int leaving;
  int supplier_moves;
  int pivots[Team::threads];  // each thread's own: held in a register it would make kernels spill
};

template <class Price, class Team, class Cost>
class DeviceTree {
 public:
  // Nothing points from one member of this to another: that would keep all of them out of registers.
  Team team;

  using Memory = SimplexMemory<Price, Team>;
  static constexpr int words = Memory::words, each = Team::nodes_each;
  static constexpr int most_columns = Team::nodes < 256 ? Team::nodes : 256;
  static constexpr bool one_warp = Team::warps == 1;

  // The supplies' perturbations add up to less than 2^row_bits, one unit of mass.
  static constexpr int row_bits = Team::nodes == 64 ? 6 : Team::nodes == 128 ? 7 : 9;
  static constexpr int mass_bits = 61 - row_bits;
  static_assert(1 << row_bits >= Team::nodes);

  __device__ __forceinline__ DeviceTree(const Team& own_team, Memory& memory, const Cost& cost, int n, int m)
      : team(own_team), memory_(memory), cost_(cost), n_(n), m_(m) {}

  // The tree that solve() left. Whoever needs what it is kept in begins with a barrier.
  __device__ __forceinline__ void take_tree() {
    for (int s = 0; s < each; ++s) arc_[s] = memory_.arc[team.thread() + s * Team::threads];
  }

  __device__ __forceinline__ Price cost(Arc arc) const { return cost_(arc.supplier, arc.consumer); }

  __device__ __forceinline__ int depth(int node) const {
    int depth = 0;
    for (int w = 0; w < words; ++w) depth += __popc(memory_.path[w][node]);
    return depth;
  }

  // The root becomes `node`. Ends with a barrier.
  __device__ __forceinline__ void move_root(int node) {
    for (int w = team.thread(); w < words; w += Team::threads) memory_.cycle[w] = memory_.path[w][node];
    team.sync();
    for (int v = team.thread(); v < Team::nodes; v += Team::threads)
      for (int w = 0; w < words; ++w) memory_.path[w][v] ^= memory_.cycle[w];
    team.sync();
  }

  // The thread's slots that hold an arc are visited as visit(s, slot, arc), s counting the thread's own.
  template <class Visit>
  __device__ __forceinline__ void each_slot(Visit visit) const {
    const int arcs = node_count() - 1;
#pragma unroll
    for (int s = 0; s < each; ++s) {
      const int slot = team.thread() + s * Team::threads;
      if (slot < arcs) visit(s, slot, unpack(arc_[s]));
    }
  }

  __device__ __forceinline__ bool on_path(int slot, int node) const {
    return memory_.path[slot / warp_lanes][node] >> slot % warp_lanes & 1u;
  }

  // Whether the supplier's end of the arc is the one farther from the root.
  __device__ __forceinline__ bool supplier_is_child(int slot, Arc arc) const { return on_path(slot, arc.supplier); }

 protected:
  // The first tree, from memory.scratch.
  __device__ __forceinline__ void start(bool dummies) {
    team.sync();
    if (team.warp() == 0) choose_first_arcs(dummies);
    team.sync();
#pragma unroll
    for (int s = 0; s < each; ++s) {
      const int slot = team.thread() + s * Team::threads;
      arc_[s] = slot < n_ + m_ - 1 ? memory_.arc[slot] : 0;
      flow_[s] = slot < n_ + m_ - 1 ? memory_.first_flow[slot] : 0;
    }
    team.sync();
    join_first_arcs();
  }

  __device__ static __forceinline__ int pack(Arc arc) { return arc.supplier << 8 | arc.consumer; }
  __device__ static __forceinline__ Arc unpack(int packed) { return {packed >> 8 & 0xff, packed & 0xff}; }

  Memory& memory_;
  const Cost cost_;
  const int n_, m_;
  int arc_[each];       // of the thread's slots
  int64_t flow_[each];  // of the thread's slots

 private:
  static constexpr int closes_row = 1 << 16;

  // In large teams added up anew, or comparisons with it would be kept in registers, of which there are none left.
  __device__ __forceinline__ int node_count() const { return one_warp ? n_ + m_ : forgotten(n_ + m_); }

  // Larger for smaller costs, and never zero. The lowest bits are left to the column.
  __device__ static __forceinline__ unsigned preference(float cost) {
    const auto bits = bit_cast<unsigned>(cost);
    return ((bits & 0x80000000u ? bits : bits ^ 0x7fffffffu) | most_columns) & ~(most_columns - 1u);
  }

  // A node's share of the mass in units.
  __device__ __forceinline__ int64_t units(int node) const {
    return llrint(memory_.scratch[node] * double(int64_t(1) << mass_bits));
  }

  // Where the start keeps what it takes for the usual cost of a column, until prices and tree costs come there.
  __device__ __forceinline__ Price& usual_cost(int j) {
    if constexpr (std::is_same_v<Price, double>)
      return memory_.scratch[n_ + j];
    else
      return memory_.price.at[n_ + j];
  }

  __device__ __forceinline__ void find_usual_cost(int j) {
    Price sum = 0, lowest = std::numeric_limits<Price>::infinity();
#pragma unroll 8
    for (int i = 0; i < n_; ++i) {
      const Price cost = cost_(i, j);
      sum += cost;
      lowest = min(lowest, cost);
    }
    usual_cost(j) = Price(0.5) * (lowest + sum / static_cast<Price>(n_));
  }

  // By one warp. Each row in turn is served by the columns that have demand left, cheapest first. Costs are taken
  // relative to the mean and the lowest of their column: without that, the first rows use up the columns that are cheap
  // for everybody, and the simplex takes half as many pivots again. Each arc uses up either its row or its column, and
  // only the last one uses up both.
  __device__ __forceinline__ void choose_first_arcs(bool dummies) {
    constexpr int columns_each = most_columns / warp_lanes;
    const int lane = team.lane();
    int64_t demand[columns_each], difference = 0, largest = 0;
    for (int i = lane; i < n_; i += warp_lanes) {
      const int64_t supply = (units(i) << row_bits) + 1;
      memory_.scratch[i] = bit_cast<double>(supply);
      difference += supply;
    }
#pragma unroll
    for (int s = 0; s < columns_each; ++s) {
      const int j = lane + s * warp_lanes;
      demand[s] = 0;
      if (j < m_) {
        const int64_t mass = units(n_ + j);
        demand[s] = (mass > 1 ? mass : dummies && j == m_ - 1 ? 0 : 1) << row_bits;
        find_usual_cost(j);
      }
      difference -= demand[s];
      largest = demand[s] > largest ? demand[s] : largest;
    }
    difference = warp_sum(difference);
    const auto top = static_cast<int64_t>(warp_max(static_cast<uint64_t>(largest)));
    // Suppliers that have less than the consumers want get the rest from their dummy.
    const int64_t of_dummy = dummies && difference < n_ ? n_ - difference : 0;
    difference += of_dummy;
    if (lane == (n_ - 1) % warp_lanes)
      memory_.scratch[n_ - 1] = bit_cast<double>(bit_cast<int64_t>(memory_.scratch[n_ - 1]) + of_dummy);
    __syncwarp(all_lanes);
    bool takes_it = lane == (dummies ? (m_ - 1) % warp_lanes : __ffs(__ballot_sync(all_lanes, largest == top)) - 1);
#pragma unroll
    for (int s = 0; s < columns_each; ++s) {
      if (takes_it && (dummies ? lane + s * warp_lanes == m_ - 1 : demand[s] == top)) {
        demand[s] += difference;
        takes_it = false;
      }
    }

    int slot = 0;
    for (int i = 0; i < n_; ++i) {
      auto left = bit_cast<int64_t>(memory_.scratch[i]);
      unsigned preferences[columns_each];
#pragma unroll
      for (int s = 0; s < columns_each; ++s) {
        const int j = lane + s * warp_lanes;
        const float cost = j < m_ ? static_cast<float>(cost_(i, j) - usual_cost(j)) : 0;
        preferences[s] = demand[s] > 0 ? preference(cost) | (most_columns - 1 - j) : 0u;
      }
      bool served;
      do {
        unsigned best = 0;
#pragma unroll
        for (int s = 0; s < columns_each; ++s) best = max(best, preferences[s]);
        const int column = most_columns - 1 - static_cast<int>(warp_max(best) % most_columns);
        int64_t wanted = 0;
#pragma unroll
        for (int s = 0; s < columns_each; ++s) wanted = column == lane + s * warp_lanes ? demand[s] : wanted;
        wanted = __shfl_sync(all_lanes, wanted, column % warp_lanes);
        const int64_t moved = left < wanted ? left : wanted;
        const int packed = pack({i, column}) | (left < wanted ? closes_row : 0);
        if (lane == 0) {
          memory_.arc[slot] = packed;
          memory_.first_flow[slot] = moved;
        }
        ++slot;
        served = left <= wanted;
        left -= moved;
#pragma unroll
        for (int s = 0; s < columns_each; ++s) {
          const bool here = column == lane + s * warp_lanes;
          demand[s] -= here ? moved : 0;
          preferences[s] = here && demand[s] == 0 ? 0 : preferences[s];
        }
      } while (!served);
    }
  }

  // Each arc joins the node it used up to the tree. What is known of a node's path gets twice as long in each round, by
  // that of the node where it ends. Ends with a barrier.
  __device__ __forceinline__ void join_first_arcs() {
    uint32_t path[each][words];
    int above[each];
#pragma unroll
    for (int s = 0; s < each; ++s) {
      const int v = team.thread() + s * Team::threads;
#pragma unroll
      for (int w = 0; w < words; ++w) memory_.path[w][v] = 0;
      memory_.above[v] = v;
    }
    team.sync();
    each_slot([&](int s, int slot, Arc arc) {
      const int supplier = arc.supplier, consumer = n_ + arc.consumer;
      const bool row = arc_[s] & closes_row;
      memory_.path[slot / warp_lanes][row ? supplier : consumer] = 1u << slot % warp_lanes;
      memory_.above[row ? supplier : consumer] = row ? consumer : supplier;
    });
    team.sync();
#pragma unroll
    for (int s = 0; s < each; ++s) {
      const int v = team.thread() + s * Team::threads;
#pragma unroll
      for (int w = 0; w < words; ++w) path[s][w] = memory_.path[w][v];
      above[s] = memory_.above[v];
    }
    for (int length = 1, nodes = node_count(); length < nodes; length *= 2) {
#pragma unroll
      for (int s = 0; s < each; ++s) {
#pragma unroll
        for (int w = 0; w < words; ++w) path[s][w] |= memory_.path[w][above[s]];
        above[s] = memory_.above[above[s]];
      }
      team.sync();
#pragma unroll
      for (int s = 0; s < each; ++s) {
        const int v = team.thread() + s * Team::threads;
#pragma unroll
        for (int w = 0; w < words; ++w) memory_.path[w][v] = path[s][w];
        memory_.above[v] = above[s];
      }
      team.sync();
    }
  }
};

}  // namespace fewshot_ext
