// Primal simplex for one transportation problem by a team of threads of a GPU, on the tree of device_tree.cuh.
#pragma once

#include <limits>
#include <type_traits>

#include "common/four.cuh"
#include "emd/device_tree.cuh"

namespace fewshot_ext {

template <class Price, class Team, class Cost>
class DeviceSimplex : public DeviceTree<Price, Team, Cost> {
  using Tree = DeviceTree<Price, Team, Cost>;

 public:
  using Memory = typename Tree::Memory;
  using Tree::each_slot, Tree::on_path, Tree::supplier_is_child, Tree::team;

  __device__ __forceinline__ DeviceSimplex(const Team& team, Memory& memory, const Cost& cost, int n, int m)
      : Tree(team, memory, cost, n, m) {}

  // Finds the optimal tree and leaves it in memory; false where that takes too many pivots. memory.scratch holds the
  // masses, as parts of those of their side, and is overwritten; no |cost| exceeds memory.largest_cost. `dummies`:
  // whether the last of either side is one, whose mass is what the other side has more.
  __device__ __forceinline__ bool solve(bool dummies) {
    // What the rounding of potentials, sums of costs along the tree, can make of a reduced cost of zero.
    if constexpr (!std::is_same_v<Price, double>) tolerance_ = (n_ + m_) * 0x1p-50 * memory_.largest_cost;
    Tree::start(dummies);
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

 private:
  using Tree::arc_, Tree::cost_, Tree::each, Tree::flow_, Tree::m_, Tree::memory_, Tree::most_columns, Tree::n_,
      Tree::one_warp, Tree::pack, Tree::unpack, Tree::words;

  // The best arc of all takes the fewest pivots, and that of some rows less time where a look at all is long. Of
  // several warps each looks at a group of rows.
  static constexpr int group_rows = one_warp ? Team::nodes : 4, chunk_rows = Team::warps * group_rows;
  static constexpr unsigned places = Team::warps * most_columns;  // a power of 2

  static constexpr int most_pivots = 100 * Team::nodes + Team::nodes * Team::nodes;

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

  // Of a negative number, what decides which arc enters: larger for lower ones. The lowest bits are left to the place
  // where it was found.
  template <class T>
  __device__ static __forceinline__ unsigned significance(T x) {
    const auto bits = static_cast<unsigned>(sizeof(T) == 8 ? magnitude_bits(x) >> 31 : magnitude_bits(x) << 1);
    return (bits | places) & -places;
  }

  // Potentials from the tree alone. Begins after a barrier, ends with one.
  __device__ __forceinline__ void renew_potentials() {
#pragma unroll
    for (int s = 0; s < each; ++s) memory_.scratch[team.thread() + s * Team::threads] = 0;
    each_slot([&](int, int slot, Arc arc) {
      const double cost = cost_(arc.supplier, arc.consumer);
      memory_.scratch[slot] = supplier_is_child(slot, arc) ? cost : -cost;
    });
    team.sync();
    // All arcs are looked at, for their costs are under way before it is known which are on the path.
    double sum[each] = {}, lost[each] = {};
#pragma unroll 1
    for (int w = 0; w < words; ++w) {
      uint32_t path[each];
#pragma unroll
      for (int s = 0; s < each; ++s) path[s] = memory_.path[w][team.thread() + s * Team::threads];
#pragma unroll 8
      for (int k = 0; k < warp_lanes; ++k) {
        const double cost = memory_.scratch[w * warp_lanes + k];
#pragma unroll
        for (int s = 0; s < each; ++s) {
          const double counted = path[s] & 1u << k ? cost : 0;
          if constexpr (std::is_same_v<Price, double>) lost[s] += lost_in_sum(sum[s], counted);
          sum[s] += counted;
        }
      }
    }
    uint64_t largest = 0;
#pragma unroll
    for (int s = 0; s < each; ++s) {
      const double potential = sum[s] + lost[s];
      largest = max(largest, magnitude_bits(potential));
      set_potential(team.thread() + s * Team::threads, potential);
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
    for (Arc entering; pivots_left_ > 0; --pivots_left_) {
      if (!find_entering(tolerance, entering)) return true;
      // In double, that is a matter of the last bits, which is for others to decide.
      if (!pivot(entering)) return !std::is_same_v<T, double>;
    }
    return false;
  }

  // The arc with the most negative reduced cost in the next chunk of rows that has any below -tolerance; false where no
  // chunk has.
  template <class T>
  __device__ __forceinline__ bool find_entering(T tolerance, Arc& entering) {
    if constexpr (one_warp) return find_entering(tolerance, 0, n_, entering);
    for (int looked_at = 0; looked_at < n_;) {
      const int first = next_row_, end = first + chunk_rows < n_ ? first + chunk_rows : n_;
      const bool found = find_entering(tolerance, first, end, entering);
      next_row_ = end < n_ ? end : 0;
      looked_at += end - first;
      if (found) return true;
    }
    return false;
  }

  // Lanes go through the columns, and keep no more than the lowest reduced cost: which row has it is looked up once,
  // for the column that all threads agree on. Without branches: what stands in for rows and columns beyond the last
  // are others of them.
  template <class T>
  __device__ __forceinline__ bool find_entering(T tolerance, int first_row, int end_row, Arc& entering) {
    const T* price = prices<T>();
    T best = -tolerance;
    int best_column = -1;
    const int first = first_row + team.warp() * group_rows;
    int columns = 0;
#pragma unroll 1
    do {
      const int j = min(columns + team.lane(), m_ - 1);
      const T reduced_cost = lowest_of_rows(price, first, end_row, j) + price[n_ + j];
      if (reduced_cost < best) {
        best = reduced_cost;
        best_column = j;
      }
    } while ((columns += warp_lanes) < m_);
    const unsigned place = team.warp() * most_columns + best_column;  // the first of those that tie is preferred
    const unsigned found = team.max(best_column < 0 ? 0u : significance(best) | (places - 1 - place));
    if (found == 0) return false;

    const int where = static_cast<int>(places - 1 - found % places), column = where % most_columns;
    const int row = first_row + where / most_columns * group_rows;
    constexpr int looks = one_warp ? each : 1;
    bool fits[looks];
#pragma unroll
    for (int s = 0; s < looks; ++s) {
      const int i = min(row + (team.lane() + s * warp_lanes) % group_rows, end_row - 1);
      const T reduced_cost = (T(cost_(i, column)) - price[i]) + price[n_ + column];
      fits[s] = reduced_cost < -tolerance && significance(reduced_cost) == (found & -places);
    }
    unsigned here = 0;
    int last = 31;
#pragma unroll
    for (int s = 0; s < looks; ++s) {
      const unsigned fitting = __ballot_sync(all_lanes, fits[s]);
      here = fitting ? fitting : here;
      last = fitting ? s * warp_lanes + 31 : last;
    }
    last -= __clz(static_cast<int>(here));
    entering = {min(row + last % group_rows, end_row - 1), column};
    return true;
  }

  // The lowest of cost - price in column j. By one warp in all rows, as many at once as make a window; the last window
  // begins where it still fits into what the column is filled up to.
  template <class T>
  __device__ __forceinline__ T lowest_of_rows(const T* price, int first, int end, int j) const {
    constexpr T infinity = std::numeric_limits<T>::infinity();
    T lowest[4] = {infinity, infinity, infinity, infinity};
    if constexpr (one_warp) {
      constexpr int fours = sizeof(T) == 8 ? 1 : Cost::window / 4;  // whose registers there are
      const int last = Cost::filled_rows(end) - Cost::window;
      for (int i = 0;; i = min(i + Cost::window, last)) {
#pragma unroll fours
        for (int k = 0; k < Cost::window; k += 4) {
          const auto costs = cost_.four(i + k, j);
          const auto prices = Four<T>::read(price + i + k);
#pragma unroll
          for (int r = 0; r < 4; ++r) lowest[r] = min(lowest[r], T(costs.at[r]) - prices.at[r]);
        }
        if (i == last) break;
      }
    } else {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int i = min(first + r, end - 1);
        lowest[r] = T(cost_(i, j)) - price[i];
      }
    }
    return min(min(lowest[0], lowest[1]), min(lowest[2], lowest[3]));
  }

  // False, and nothing changed, where the arc's reduced cost is not negative in double.
  __device__ __forceinline__ bool pivot(Arc entering) {
    const double reduced_cost =
        (double(cost_(entering.supplier, entering.consumer)) - memory_.potential[entering.supplier]) +
        memory_.potential[n_ + entering.consumer];
    const bool improves = reduced_cost < -tolerance_;
    uint32_t from[each], cycle[each], leaving[each];
    bool falls[each];
    uint64_t key = 0;
#pragma unroll
    for (int s = 0; s < each; ++s) {
      const int slot = team.thread() + s * Team::threads;
      from[s] = memory_.path[slot / warp_lanes][entering.supplier];
      cycle[s] = from[s] ^ memory_.path[slot / warp_lanes][n_ + entering.consumer];
      const bool on_supplier_side = from[s] >> team.lane() & 1u;
      falls[s] = (cycle[s] >> team.lane() & 1u) & (on_supplier_side == supplier_is_child(slot, unpack(arc_[s])));
      const uint64_t preferred = falls[s] ? ~static_cast<uint64_t>(flow_[s]) : 0;
      key = preferred > key ? preferred : key;
    }
    // The paths of all nodes, where they are few enough to have them at hand.
    uint32_t path[each][one_warp ? words : 1];
    double potential[each];
    if constexpr (one_warp) {
#pragma unroll
      for (int s = 0; s < each; ++s) {
        const int v = team.thread() + s * Team::threads;
#pragma unroll
        for (int w = 0; w < words; ++w) path[s][w] = memory_.path[w][v];
        potential[s] = memory_.potential[v];
      }
    }
    key = team.max(key);
    const int64_t moved = improves ? static_cast<int64_t>(~key) : 0;  // no flow is 0
    bool supplier_moves = false;
#pragma unroll
    for (int s = 0; s < each; ++s) {
      const bool leaves = falls[s] && flow_[s] == moved, changes = cycle[s] >> team.lane() & 1u;
      flow_[s] = leaves ? moved : flow_[s] + (falls[s] ? -moved : changes ? moved : 0);
      arc_[s] = leaves ? pack(entering) : arc_[s];
      leaving[s] = __ballot_sync(all_lanes, leaves);
      supplier_moves |= (from[s] & leaving[s]) != 0;
      cycle[s] &= ~leaving[s];
    }
    if constexpr (one_warp) {
      const double change = supplier_moves ? reduced_cost : -reduced_cost;
      team.sync();
#pragma unroll
      for (int s = 0; s < each; ++s) {
        const int v = team.thread() + s * Team::threads;
        uint32_t below = 0;
#pragma unroll
        for (int w = 0; w < words; ++w) below |= path[s][w] & leaving[w];
        potential[s] += change;
        if (below == 0) continue;
#pragma unroll
        for (int w = 0; w < words; ++w) memory_.path[w][v] = path[s][w] ^ cycle[w];
        set_potential(v, potential[s]);
      }
    } else {
      if (team.lane() == 0) memory_.cycle[team.warp()] = cycle[0];
      if (leaving[0] >> team.lane() & 1u) {
        memory_.leaving = team.thread();
        memory_.supplier_moves = supplier_moves;
      }
      team.sync();
      if (improves && on_path(memory_.leaving, team.thread())) {
        for (int w = 0; w < words; ++w) memory_.path[w][team.thread()] ^= memory_.cycle[w];
        set_potential(team.thread(),
                      memory_.potential[team.thread()] + (memory_.supplier_moves ? reduced_cost : -reduced_cost));
      }
    }
    team.sync();
    return improves;
  }

  double tolerance_;
  int pivots_left_;
  int next_row_ = 0;
};

}  // namespace fewshot_ext
