// Primal simplex for one transportation problem by a team of threads of a GPU.
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

#include "common/four.cuh"
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
    Price at[nodes];
  };
  struct None {};

  typename Team::Memory team;
  union {
    double potential[nodes];    // u of suppliers, -v of consumers
    int64_t first_flow[nodes];  // of slots, until the threads take them over
  };
  double scratch[nodes];
  std::conditional_t<std::is_same_v<Price, double>, None, Rounded> price;  // potentials
  uint32_t path[words][nodes];                                             // bit s of word w: slot 32 w + s
  uint32_t cycle[words];
  int arc[nodes];
  int64_t of_dummy;  // what a supplying dummy has
  double largest_cost;
  int leaving;
  int supplier_moves;
  int pivots[Team::threads];  // each thread's own: held in a register it would make kernels spill
};

template <class Price, class Team, class Cost>
class DeviceSimplex {
 public:
  // Nothing points from one member of this to another: that would keep all of them out of registers.
  Team team;

  using Memory = SimplexMemory<Price, Team>;
  static constexpr int words = Memory::words, each = Team::nodes_each;
  static constexpr int most_columns = Team::nodes < 256 ? Team::nodes : 256;

  // The supplies' perturbations add up to less than 2^row_bits, one unit of mass.
  static constexpr int row_bits = Team::nodes == 64 ? 6 : Team::nodes == 128 ? 7 : 9;
  static constexpr int mass_bits = 61 - row_bits;
  static_assert(1 << row_bits >= Team::nodes);

  __device__ __forceinline__ DeviceSimplex(const Team& own_team, Memory& memory, const Cost& cost, int n, int m)
      : team(own_team), memory_(memory), cost_(cost), n_(n), m_(m) {}

  // Finds the optimal tree and leaves it in memory; false where that takes too many pivots. memory.scratch holds the
  // masses, as parts of those of their side, and is overwritten; no |cost| exceeds memory.largest_cost. `dummies`:
  // whether the last of either side is one, whose mass is what the other side has more.
  __device__ __forceinline__ bool solve(bool dummies) {
    // What the rounding of potentials, sums of costs along the tree, can make of a reduced cost of zero.
    if constexpr (!std::is_same_v<Price, double>) tolerance_ = (n_ + m_) * 0x1p-50 * memory_.largest_cost;
    start(dummies);
    renew_potentials();
    pivots_left_ = most_pivots;
    const Price rounding = std::is_same_v<Price, double> ? (n_ + m_) * 0x1p-50 : 0x1p-22;
    if (!improve<Price>(rounding * static_cast<Price>(memory_.largest_cost))) return false;
    // Proved in double, with potentials that carry no rounding from pivots.
    int& before = memory_.pivots[team.thread()];
    do {
      before = pivots_left_;
      renew_potentials();
      if (!improve<double>(tolerance_)) return false;
    } while (before != pivots_left_);
    memory_.pivots[team.thread()] = most_pivots - pivots_left_;
    for (int s = 0; s < each; ++s) memory_.arc[team.thread() + s * Team::threads] = arc_[s];
    return true;
  }

  // The tree that solve() left. Whoever needs what it is kept in begins with a barrier.
  __device__ __forceinline__ void take_tree() {
    for (int s = 0; s < each; ++s) arc_[s] = memory_.arc[team.thread() + s * Team::threads];
  }

  // Of a solved problem.
  __device__ __forceinline__ int pivots() const { return memory_.pivots[team.thread()]; }

  // By how much reduced costs of the solved problem may be below 0, in units of 2^-53; no node is more than `deepest`
  // arcs from the root.
  __device__ __forceinline__ double dual_error(int deepest, double largest_potential) const {
    // The tolerance, and as much again for the rounding of the reduced costs themselves: of potentials, which are
    // rounded once, and of two sums.
    if constexpr (std::is_same_v<Price, double>) return 8 * (largest_potential + memory_.largest_cost);
    // The tolerance, and the sums of `deepest` costs.
    return (8.0 * (n_ + m_) + 2.0 * deepest * deepest + 3.0 * deepest + 2) * memory_.largest_cost;
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

 private:
  static constexpr int closes_row = 1 << 16;
  static constexpr int cell_mask = 0xffff;
  // The best arc of all takes the fewest pivots, and that of some rows less time where a look at all is long.
  static constexpr int group_rows = Team::warps == 1 ? warp_lanes : 4;
  static constexpr int chunk_rows = Team::warps * group_rows;  // of several warps; one looks at all rows
  static constexpr int rows_at_once = Team::warps == 1 ? 8 : group_rows;
  // In large teams added up anew, or comparisons with it would be kept in registers, of which there are none left.
  __device__ __forceinline__ int node_count() const { return Team::warps > 1 ? forgotten(n_ + m_) : n_ + m_; }

  static constexpr int most_pivots = 100 * Team::nodes + Team::nodes * Team::nodes;

  __device__ static __forceinline__ int pack(Arc arc) { return arc.supplier << 8 | arc.consumer; }
  __device__ static __forceinline__ Arc unpack(int packed) { return {packed >> 8 & 0xff, packed & 0xff}; }

  template <class T>
  __device__ __forceinline__ const T* prices() const {
    if constexpr (std::is_same_v<T, double>)
      return memory_.potential;
    else
      return memory_.price.at;
  }

  __device__ __forceinline__ void set_potential(int node, double potential) {
    memory_.potential[node] = potential;
    if constexpr (!std::is_same_v<Price, double>) memory_.price.at[node] = static_cast<Price>(potential);
  }

  // Of a negative number, what decides in comparisons: larger for lower ones. The bits of a double are cut.
  template <class T>
  __device__ static __forceinline__ uint64_t significant_bits(T x) {
    if constexpr (sizeof(T) == 8)
      return bit_cast<uint64_t>(x) >> 16;
    else
      return static_cast<uint64_t>(bit_cast<uint32_t>(x)) << 16;
  }

  // Larger for smaller costs, and never zero.
  __device__ static __forceinline__ unsigned preference(float cost) {
    const auto bits = bit_cast<unsigned>(cost);
    return (bits & 0x80000000u ? bits : bits ^ 0x7fffffffu) | 1u;
  }

  __device__ __forceinline__ void start(bool dummies) {
    team.sync();
    for (int v = team.thread(); v < Team::nodes; v += Team::threads)
      for (int w = 0; w < words; ++w) memory_.path[w][v] = 0;
    team.sync();
    if (team.warp() == 0) {
      choose_first_arcs(dummies);
      __syncwarp(all_lanes);
      join_first_arcs();
    }
    team.sync();
#pragma unroll
    for (int s = 0; s < each; ++s) {
      const int slot = team.thread() + s * Team::threads;
      arc_[s] = slot < n_ + m_ - 1 ? memory_.arc[slot] : 0;
      flow_[s] = slot < n_ + m_ - 1 ? memory_.first_flow[slot] : 0;
    }
    team.sync();
  }

  // A node's share of the mass in units.
  __device__ __forceinline__ int64_t units(int node) const {
    return llrint(memory_.scratch[node] * double(int64_t(1) << mass_bits));
  }

  __device__ __forceinline__ int64_t supply(int i) const { return (units(i) << row_bits) + 1; }

  // Where the start keeps what it takes for the usual cost of a column, until prices and tree costs come there.
  __device__ __forceinline__ Price& usual_cost(int j) {
    if constexpr (std::is_same_v<Price, double>)
      return memory_.scratch[n_ + j];
    else
      return memory_.price.at[n_ + j];
  }

  __device__ __forceinline__ void find_usual_cost(int j) {
    Price sum = 0, lowest = std::numeric_limits<Price>::infinity();
#pragma unroll 4
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
    for (int i = lane; i < n_; i += warp_lanes) difference += supply(i);
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
    if (lane == 0) memory_.of_dummy = of_dummy;
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
      unsigned preferences[columns_each];
#pragma unroll
      for (int s = 0; s < columns_each; ++s) {
        const int j = lane + s * warp_lanes;
        preferences[s] = demand[s] > 0 ? preference(static_cast<float>(cost_(i, j) - usual_cost(j))) : 0u;
      }
      int64_t left = supply(i) + (i == n_ - 1 ? memory_.of_dummy : 0);
      while (left > 0) {
        unsigned best = 0;
        int64_t best_demand = 0;
        int best_column = 0;
#pragma unroll
        for (int s = 0; s < columns_each; ++s) {
          if (preferences[s] > best) {
            best = preferences[s];
            best_demand = demand[s];
            best_column = lane + s * warp_lanes;
          }
        }
        const unsigned found = __reduce_max_sync(all_lanes, best);
        const int owner = __ffs(__ballot_sync(all_lanes, best == found)) - 1;
        const int column = __shfl_sync(all_lanes, best_column, owner);
        const int64_t wanted = __shfl_sync(all_lanes, best_demand, owner);
        const int64_t moved = left < wanted ? left : wanted;
        if (lane == 0) {
          memory_.arc[slot] = pack({i, column}) | (left < wanted ? closes_row : 0);
          memory_.first_flow[slot] = moved;
        }
        ++slot;
        left -= moved;
#pragma unroll
        for (int s = 0; s < columns_each; ++s) {
          if (column == lane + s * warp_lanes) {
            demand[s] -= moved;
            if (demand[s] == 0) preferences[s] = 0;
          }
        }
      }
    }
  }

  // By one warp. Backwards from the last arc, each arc joins the node it used up to the tree; a lane has a word of the
  // paths to itself.
  __device__ __forceinline__ void join_first_arcs() {
    const int w = team.lane();
    if (w >= words) return;
    for (int slot = n_ + m_ - 2; slot >= 0; --slot) {
      const int packed = memory_.arc[slot];
      const Arc arc = unpack(packed);
      const int supplier = arc.supplier, consumer = n_ + arc.consumer;
      const bool row = packed & closes_row;
      const uint32_t bit = w == slot / warp_lanes ? 1u << slot % warp_lanes : 0u;
      memory_.path[w][row ? supplier : consumer] = memory_.path[w][row ? consumer : supplier] | bit;
    }
  }

  // Potentials from the tree alone. Begins after a barrier, ends with one.
  __device__ __forceinline__ void renew_potentials() {
    each_slot([&](int, int slot, Arc arc) {
      const double cost = cost_(arc.supplier, arc.consumer);
      memory_.scratch[slot] = supplier_is_child(slot, arc) ? cost : -cost;
    });
    team.sync();
    uint64_t largest = 0;
    for (int v = team.thread(), nodes = node_count(); v < nodes; v += Team::threads) {
      double sum = 0, lost = 0;
      for (int w = 0; w < words; ++w) {
        for (uint32_t rest = memory_.path[w][v]; rest != 0; rest &= rest - 1) {
          const double cost = memory_.scratch[w * warp_lanes + __ffs(static_cast<int>(rest)) - 1];
          if constexpr (std::is_same_v<Price, double>) lost += lost_in_sum(sum, cost);
          sum += cost;
        }
      }
      if constexpr (std::is_same_v<Price, double>) {
        sum += lost;
        const uint64_t bits = magnitude_bits(sum);
        largest = bits > largest ? bits : largest;
      }
      set_potential(v, sum);
    }
    // With double costs the tolerance decides about the last digits of the value, and is no larger than these
    // potentials need.
    if constexpr (std::is_same_v<Price, double>)
      tolerance_ = 0x1p-51 * (from_magnitude_bits<double>(team.max(largest)) + memory_.largest_cost);
    team.sync();
  }

  // What a + b is more than the double that it is rounded to.
  __device__ static __forceinline__ double lost_in_sum(double a, double b) {
    const double sum = a + b, of_b = sum - a;
    return (a - (sum - of_b)) + (b - of_b);
  }

  // Pivots until no arc has a reduced cost below -tolerance in the arithmetic of T. False: too many of them.
  template <class T>
  __device__ __forceinline__ bool improve(T tolerance) {
    Arc entering;
    while (find_entering(tolerance, entering)) {
      if (pivots_left_ == 0) return false;
      // In double, that is a matter of the last bits, which is for others to decide.
      if (!pivot(entering)) return !std::is_same_v<T, double>;
      --pivots_left_;
    }
    return true;
  }

  // The arc with the most negative reduced cost in the next chunk of rows that has any below -tolerance; false where no
  // chunk has. Lanes go through the columns, a group of rows at a time, and keep no more than the lowest reduced cost:
  // which row has it is looked up once, for the arc that all threads agree on.
  template <class T>
  __device__ __forceinline__ bool find_entering(T tolerance, Arc& entering) {
    for (int looked_at = 0; looked_at < n_;) {
      const int first = next_row_, end = Team::warps > 1 && first + chunk_rows < n_ ? first + chunk_rows : n_;
      const uint64_t found = find_entering(tolerance, first, end, entering);
      next_row_ = end < n_ ? end : 0;
      looked_at += end - first;
      if (found) return true;
    }
    return false;
  }

  // The lowest of cost - price in column j and `count` rows from i on; all are `inside`, or the last before `end`
  // stands in for those beyond. Without branches, so that the loads are under way together.
  template <int count, bool inside, class T>
  __device__ __forceinline__ T lowest_of_rows(const T* price, int i, int end, int j) const {
    T lowest = std::numeric_limits<T>::infinity();
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int row = inside || i + k < end ? i + k : end - 1;
      lowest = min(lowest, T(cost_(row, j)) - price[row]);
    }
    return lowest;
  }

  template <class T>
  __device__ __forceinline__ bool find_entering(T tolerance, int first_row, int end_row, Arc& entering) {
    const T* price = prices<T>();
    T best = -tolerance;
    int best_group = -1, best_column = 0;
    for (int group = team.warp(); first_row + group * group_rows < end_row; group += Team::warps) {
      const int first = first_row + group * group_rows;
      const int end = first + group_rows < end_row ? first + group_rows : end_row;
      for (int j = team.lane(); j < m_; j += warp_lanes) {
        T lowest = std::numeric_limits<T>::infinity();
        int i = first;
#pragma unroll 1
        for (; i + rows_at_once <= end; i += rows_at_once)
          lowest = min(lowest, lowest_of_rows<rows_at_once, true>(price, i, end, j));
#pragma unroll 1
        for (; i < end; i += 4) lowest = min(lowest, lowest_of_rows<4, false>(price, i, end, j));
        const T reduced_cost = lowest + price[n_ + j];
        if (reduced_cost < best) {
          best = reduced_cost;
          best_group = group;
          best_column = j;
        }
      }
    }
    const int place = cell_mask - pack({best_group, best_column});  // the first of those that tie is preferred
    const uint64_t found = team.max(best_group < 0 ? 0 : significant_bits(best) << 16 | place);
    if (found == 0) return false;

    const Arc where = unpack(cell_mask - static_cast<int>(found & cell_mask));
    const int first = first_row + where.supplier * group_rows, i = first + team.lane();
    bool here = false;
    if (team.lane() < group_rows && i < end_row) {
      const T reduced_cost = (T(cost_(i, where.consumer)) - price[i]) + price[n_ + where.consumer];
      here = significant_bits(reduced_cost) == found >> 16;
    }
    entering = {first + __ffs(__ballot_sync(all_lanes, here)) - 1, where.consumer};
    return true;
  }

  // False, and nothing changed, where the arc's reduced cost is not negative in double.
  __device__ __forceinline__ bool pivot(Arc entering) {
    const double reduced_cost =
        (double(cost_(entering.supplier, entering.consumer)) - memory_.potential[entering.supplier]) +
        memory_.potential[n_ + entering.consumer];
    bool on_supplier_side[each], changes[each], falls[each];
    uint64_t key = 0;
#pragma unroll
    for (int s = 0; s < each; ++s) {
      const int slot = team.thread() + s * Team::threads;
      const uint32_t from = memory_.path[slot / warp_lanes][entering.supplier];
      const uint32_t to = memory_.path[slot / warp_lanes][n_ + entering.consumer];
      const bool supplier_below = supplier_is_child(slot, unpack(arc_[s]));
      on_supplier_side[s] = from >> team.lane() & 1u;
      changes[s] = (from ^ to) >> team.lane() & 1u;
      falls[s] = changes[s] & (on_supplier_side[s] == supplier_below);
      const uint64_t preferred = falls[s] ? ~static_cast<uint64_t>(flow_[s]) : 0;
      key = preferred > key ? preferred : key;
      if (team.lane() == 0) memory_.cycle[slot / warp_lanes] = from ^ to;
    }
    const auto moved = static_cast<int64_t>(~team.max(key));
    if (!(reduced_cost < -tolerance_)) return false;
#pragma unroll
    for (int s = 0; s < each; ++s) {
      if (falls[s] && flow_[s] == moved) {
        memory_.leaving = team.thread() + s * Team::threads;
        memory_.supplier_moves = on_supplier_side[s];
        arc_[s] = pack(entering);
        flow_[s] = moved;
      } else if (changes[s]) {
        flow_[s] += falls[s] ? -moved : moved;
      }
    }
    team.sync();

    const int leaving = memory_.leaving;
    const double change = memory_.supplier_moves ? reduced_cost : -reduced_cost;
#pragma unroll
    for (int s = 0; s < each; ++s) {
      const int v = team.thread() + s * Team::threads;
      if (!on_path(leaving, v)) continue;
#pragma unroll
      for (int w = 0; w < words; ++w) {
        const uint32_t kept = w == leaving / warp_lanes ? 1u << leaving % warp_lanes : 0u;
        memory_.path[w][v] ^= memory_.cycle[w] & ~kept;
      }
      set_potential(v, memory_.potential[v] + change);
    }
    team.sync();
    return true;
  }

  Memory& memory_;
  const Cost cost_;
  const int n_, m_;
  double tolerance_;
  int pivots_left_;
  int next_row_ = 0;
  int arc_[each];       // of the thread's slots
  int64_t flow_[each];  // of the thread's slots
};

}  // namespace fewshot_ext
