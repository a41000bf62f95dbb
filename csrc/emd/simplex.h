// Primal simplex for one transportation problem. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
//
// A basis is a spanning tree of rows (suppliers) and columns (consumers). Its arcs have slots 0 .. rows + columns - 2,
// and each slot keeps the set of nodes on the far side of its arc, seen from the root, as bits. When an arc enters and
// the slot that leaves has the set S,
//
//   the arc takes over the slot, and with it S, and
//   every other arc of the cycle gets the set (its own) ^ S,
//
// so there is no subtree to walk: with up to 64 nodes, a pivot changes one word for each arc of the cycle. The sets
// also say where the ways from the arc's two ends to the root meet.
//
// Flows are integers: masses are scaled to the full width, and every row's supply is then raised by one unit of a finer
// grid, at the expense of one column's demand. With that perturbation no basic flow is ever 0 (a subtree without rows
// is a single column, and it has mass), so each pivot lowers the objective whatever the ties in the data, and no
// sequence of pivots can come back to a basis. Exact arithmetic makes this a proof and not a hope. The final tree is
// optimal for the problem as given, too; its flows and duals are computed from it anew.
#pragma once

#include "common/cancellation.h"
#include "common/memory.h"
#include "common/simd.h"
#include "emd/regret_start.h"
#include "emd/vector_min.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// Float is what reduced costs are priced in: float for float32 costs, double for float64.
template <class Float>
class TransportSimplex {
  using Uint = typename Simd<double>::Uint;
  using UintVector = typename Simd<double>::UintVector;
  static constexpr int node_lanes = Simd<double>::lanes;
  static constexpr int word_bits = 64;
  // Numbers of a row in its block and of a lane, in the last bits of reduced costs.
  static constexpr int row_bits = 4, lane_bits = 4;
  static constexpr int64_t block_rows = 16;

 public:
  static constexpr int cost_lanes = Simd<Float>::lanes;

  // Elements between rows of the cost matrix. The caller fills the columns beyond the last with `no_arc`.
  static int64_t cost_stride(int64_t columns) { return (columns + cost_lanes - 1) / cost_lanes * cost_lanes; }
  static constexpr Float no_arc = std::numeric_limits<Float>::max() / 4;
  // Costs up to here keep every sum of costs along a tree of 2^15 nodes below `no_arc`.
  static constexpr Float largest_cost = no_arc / (1 << 16);

  template <class Arena>
  void lay_out(Arena& arena, int64_t most_rows, int64_t most_columns) {
    const int64_t nodes = most_rows + most_columns, padded = padded_nodes(most_rows, most_columns);
    supply = arena.template take<int64_t>(most_rows);
    demand = arena.template take<int64_t>(most_columns);
    row_of = arena.template take<int32_t>(nodes);
    column_of = arena.template take<int32_t>(nodes);
    below_ = arena.template take<Uint>((nodes + 1) * words_for(nodes));
    above_ = arena.template take<Link>(nodes);
    flow_ = arena.template take<int64_t>(nodes + 1);
    cycle_ = arena.template take<int32_t>(nodes + 2);
    moved_ = arena.template take<Uint>(words_for(nodes));
    order_ = arena.template take<int32_t>(nodes);
    size_begin_ = arena.template take<int32_t>(nodes + 1);
    potential_ = arena.template take<double>(padded);
    price_ = arena.template take<Float>(padded);
  }

  // Bytes of the sets, which grow with the square of the number of nodes.
  static int64_t bytes_of_sets(int64_t nodes) { return (nodes + 1) * words_for(nodes) * int64_t(sizeof(Uint)); }

  // The problem: cost [rows][cost_stride(columns)], up to `largest_cost` in magnitude, and the perturbed masses. The
  // start uses the masses up.
  const Float* cost;
  int64_t* supply;
  int64_t* demand;
  // The tree: slots [0, rows + columns - 1) hold the arcs (row_of, column_of).
  int32_t* row_of;
  int32_t* column_of;

  // The node at the other end of the arc towards row 0, and that arc's slot. Nodes are rows first, then columns.
  struct Link {
    int32_t parent, slot;
  };
  const Link& link_of(int64_t node) const { return above_[node]; }

  int64_t pivots() const { return pivots_; }
  double* potentials() { return potential_; }

  // False: was told to stop.
  bool begin(int64_t rows, int64_t columns, double tolerance, RegretStart<Float>& first, Cancellation& cancellation) {
    rows_ = rows;
    columns_ = columns;
    stride_ = cost_stride(columns);
    nodes_ = rows + columns;
    padded_ = padded_nodes(rows, columns);
    words_ = words_for(nodes_);
    tolerance_ = tolerance;
    pivots_ = 0;
    next_row_ = 0;
    return start(first, cancellation);
  }

  // Pivots until no arc of negative reduced cost is found, in the arithmetic of Price. False: gave up, or was told to
  // stop.
  template <class Price>
  __attribute__((noinline)) bool optimize(int64_t pivot_limit, Cancellation& cancellation) {
    Arc arc;
    Candidate runner_up;
    while (find_entering<Price>(arc, runner_up)) {
      if (pivots_ >= pivot_limit) return false;
      if (++searches_ % 64 == 0 && cancellation.requested()) return false;
      enter(arc);
      // Most often still worth a pivot, and cheaper than a search.
      if (best_of<Price>(runner_up, arc)) enter(arc);
    }
    return true;
  }

  // All nodes, row 0 first and each after its parent, and the potentials computed anew in this order: pivots add up
  // rounding. A parent comes first because more nodes are below its arc than below its child's.
  const int32_t* renew_potentials() {
    std::fill(size_begin_, size_begin_ + nodes_ + 1, 0);
    for (int64_t k = 0; k < nodes_; ++k) ++size_begin_[nodes_ - count_below(above_[k].slot) + 1];
    for (int64_t size = 1; size <= nodes_; ++size) size_begin_[size] += size_begin_[size - 1];
    for (int64_t k = 0; k < nodes_; ++k)
      order_[size_begin_[nodes_ - count_below(above_[k].slot)]++] = static_cast<int32_t>(k);
    potential_[0] = 0;
    for (int64_t k = 1; k < nodes_; ++k) set_potential(order_[k]);
    round_potentials();
    Vector<double> largest{};
    for (int64_t k = 0; k < padded_; k += node_lanes) {
      const Vector<double> v = load(potential_ + k);
      largest = larger<double>(v < 0 ? -v : v, largest);
    }
    largest_potential_ = -horizontal_min<double>(-largest);
    // With double costs the tolerance decides about the last digits of the value, and is no larger than these
    // potentials need: each is rounded once for every arc on its way to the root, and a reduced cost is a sum of two
    // and a cost.
    if constexpr (std::is_same_v<Float, double>) {
      int32_t* const depth = cycle_;
      int32_t deepest = depth[0] = 0;
      for (int64_t k = 1; k < nodes_; ++k)
        deepest = std::max(deepest, depth[order_[k]] = depth[above_[order_[k]].parent] + 1);
      tolerance_ = double(2 * deepest + 4) * 0x1p-53 * largest_potential_;
    }
    return order_;
  }

  // How far below 0 a reduced cost may be once no arc was found, its own rounding included.
  double tolerance() const {
    if constexpr (std::is_same_v<Float, double>)
      return 2 * tolerance_;
    else
      return tolerance_ + double(2 * nodes_ + 4) * 0x1p-53 * largest_potential_;
  }

 private:
  struct Arc {
    int64_t row, column;
    double reduced_cost;
  };

  // The arcs of a row to every lanes-th column from `column` on.
  struct Candidate {
    int64_t row, column;
  };

  // Potentials are read by vectors from any column on, and changed by words of the sets.
  static int64_t padded_nodes(int64_t rows, int64_t columns) {
    return (rows + cost_stride(columns) + word_bits - 1) / word_bits * word_bits;
  }

  // One word, or whole vectors.
  static int64_t words_for(int64_t nodes) {
    const int64_t words = (nodes + word_bits - 1) / word_bits;
    return words == 1 ? 1 : (words + node_lanes - 1) / node_lanes * node_lanes;
  }

  double reduced_cost(int64_t i, int64_t j) const {
    return double(cost[i * stride_ + j]) - potential_[i] + potential_[rows_ + j];
  }

  // In the perturbed problem each arc of the first basis uses up either its row or its column, and the last one uses up
  // both. So, backwards from the last arc, each arc joins the node it used up to the tree.
  bool start(RegretStart<Float>& first, Cancellation& cancellation) {
    int64_t slot = 0;
    const bool complete = first.run(cost, stride_, rows_, columns_, cancellation, [&](int64_t i, int64_t j) {
      row_of[slot] = static_cast<int32_t>(i);
      column_of[slot] = static_cast<int32_t>(j);
      const int64_t moved = std::min(supply[i], demand[j]);
      flow_[slot] = moved;
      supply[i] -= moved;
      demand[j] -= moved;
      const bool row_used_up = supply[i] == 0;
      const int32_t row = static_cast<int32_t>(i), column = static_cast<int32_t>(rows_ + j);
      above_[row_used_up ? row : column] = {row_used_up ? column : row, static_cast<int32_t>(slot)};
      ++slot;
      return row_used_up;
    });
    if (!complete) return false;
    const int64_t root = rows_ + column_of[slot - 1];
    // No arc, and everything is below it.
    above_[root] = {static_cast<int32_t>(root), static_cast<int32_t>(slot)};
    std::fill(below_, below_ + (nodes_ + 1) * words_, Uint(0));
    flow_[nodes_] = 0;
    add_below(slot, root);
    for (int64_t k = 0; k < slot; ++k) {
      const int64_t node = child_of(k);
      add_below(k, node);
      const Uint* from = below_ + k * words_;
      Uint* to = below_ + above_[above_[node].parent].slot * words_;
      for (int64_t w = 0; w < words_; ++w) to[w] |= from[w];
    }
    std::fill(potential_, potential_ + padded_, 0.0);
    for (int64_t k = slot - 1; k >= 0; --k) set_potential(child_of(k));
    std::fill(price_ + nodes_, price_ + padded_, Float(0));
    round_potentials();
    // Trees are handed out with row 0 as their root.
    const Uint* all = below_ + slot * words_;
    turn_links(0, {0, static_cast<int32_t>(slot)}, slot, [&](int64_t turned) {
      for (int64_t w = 0; w < words_; ++w) below_[turned * words_ + w] ^= all[w];
    });
    return true;
  }

  // The links from `node` up to the one of the slot `last` are turned to lead to `node`, which gets `link` for its own.
  template <class Visit>
  FEWSHOT_EXT_INLINE void turn_links(int64_t node, Link link, int64_t last, const Visit& visit) {
    Link* const above = above_;
    for (;;) {
      const Link old = above[node];
      above[node] = link;
      if (old.slot == last) return;
      visit(old.slot);
      link = {static_cast<int32_t>(node), old.slot};
      node = old.parent;
    }
  }

  void set_potential(int64_t node) {
    const Link link = above_[node];
    const double c = cost[row_of[link.slot] * stride_ + column_of[link.slot]];
    potential_[node] = potential_[link.parent] + (node < rows_ ? c : -c);
  }

  void round_potentials() {
    if constexpr (!std::is_same_v<Float, double>)
      for (int64_t k = 0; k < nodes_; ++k) price_[k] = static_cast<Float>(potential_[k]);
  }

  int64_t count_below(int64_t slot) const {
    int64_t count = 0;
    for (int64_t w = 0; w < words_; ++w) count += __builtin_popcountll(below_[slot * words_ + w]);
    return count;
  }

  int64_t child_of(int64_t slot) const {
    const int64_t row = row_of[slot];
    return above_[row].slot == slot ? row : rows_ + column_of[slot];
  }

  void add_below(int64_t slot, int64_t node) {
    below_[slot * words_ + node / word_bits] |= Uint(1) << (node % word_bits);
  }
  template <class Price>
  FEWSHOT_EXT_INLINE Vector<Price> load_cost(const Float* from) const {
    if constexpr (std::is_same_v<Price, Float>) {
      return load<Price>(from);
    } else {
      typedef Float Narrow __attribute__((vector_size(Simd<Price>::lanes * sizeof(Float))));
      Narrow v;
      std::memcpy(&v, from, sizeof(v));
      return __builtin_convertvector(v, Vector<Price>);
    }
  }

  template <class Price>
  const Price* prices() const {
    if constexpr (std::is_same_v<Price, double>)
      return potential_;
    else
      return price_;
  }

  // The arc of lowest reduced cost in the first block of rows, counted from where the last search ended, that has one
  // below the tolerance.
  template <class Price>
  bool find_entering(Arc& arc, Candidate& runner_up) {
    using V = Vector<Price>;
    using Bits = typename Simd<Price>::Uint;
    using BitVector = typename Simd<Price>::UintVector;
    constexpr int lanes = Simd<Price>::lanes;
    constexpr int rows_at_once = 4;
    constexpr Bits index_mask = (1 << (row_bits + lane_bits)) - 1;
    const Price* potentials = prices<Price>();
    const Price* column_potentials = potentials + rows_;
    const BitVector lane_places = lane_numbers<Price>() << row_bits;
    const int64_t stride = stride_, rows = rows_;
    const Price limit = static_cast<Price>(-tolerance_);
    for (int64_t scanned = 0; scanned < rows;) {
      const int64_t first = next_row_;
      const int64_t count = std::min<int64_t>({block_rows, rows - first, rows - scanned});
      V best = splat(limit);
      for (int64_t r = 0; r < count; r += rows_at_once) {
        // Rows beyond the last of the block are that row again, which changes nothing.
        int64_t at[rows_at_once];
        V lowest[rows_at_once];
#pragma GCC unroll 4
        for (int k = 0; k < rows_at_once; ++k) {
          at[k] = std::min(r + k, count - 1);
          lowest[k] = splat(static_cast<Price>(no_arc));
        }
        for (int64_t c = 0; c < stride; c += lanes) {
          const V column = load<Price>(column_potentials + c);
#pragma GCC unroll 4
          for (int k = 0; k < rows_at_once; ++k)
            lowest[k] = smaller<Price>(load_cost<Price>(cost + (first + at[k]) * stride + c) + column, lowest[k]);
        }
#pragma GCC unroll 4
        for (int k = 0; k < rows_at_once; ++k) {
          lowest[k] -= potentials[first + at[k]];
          lowest[k] = pack_index<Price>(lowest[k], lane_places + Bits(at[k]), index_mask);
        }
        best = smaller<Price>(
            smaller<Price>(smaller<Price>(lowest[0], lowest[1]), smaller<Price>(lowest[2], lowest[3])), best);
      }
      scanned += count;
      next_row_ = first + count == rows ? 0 : first + count;
      Price lowest, next;
      horizontal_two_lowest<Price>(best, splat(limit), lowest, next);
      if (!(lowest < limit)) continue;
      runner_up = candidate(next, first);
      if (next == limit) runner_up.column = stride_;
      if (best_of<Price>(candidate(lowest, first), arc)) return true;
    }
    return false;
  }

  template <class Price>
  static Candidate candidate(Price packed, int64_t first_row) {
    typename Simd<Price>::Uint bits;
    std::memcpy(&bits, &packed, sizeof(bits));
    return {first_row + static_cast<int64_t>(bits & ((1 << row_bits) - 1)),
            static_cast<int64_t>(bits >> row_bits & ((1 << lane_bits) - 1))};
  }

  // The candidate's arc of lowest reduced cost, if that is below the tolerance; in double, from the potentials as they
  // are by now.
  template <class Price>
  FEWSHOT_EXT_INLINE bool best_of(const Candidate& candidate, Arc& arc) const {
    double lowest = -tolerance_;
    int64_t column = -1;
    // To the end of the padding, which never wins, so that the number of turns is always the same.
    for (int64_t j = candidate.column; j < stride_; j += Simd<Price>::lanes) {
      const double r = reduced_cost(candidate.row, j);
      const bool lower = r < lowest;
      lowest = lower ? r : lowest;
      column = lower ? j : column;
    }
    arc = {candidate.row, column, lowest};
    return column >= 0;
  }

  FEWSHOT_EXT_INLINE void enter(const Arc& arc) {
    ++pivots_;
    if (words_ == 1)
      pivot<true>(arc);
    else
      pivot<false>(arc);
  }

  struct Bottleneck {
    int64_t flow, place;
  };

  // Arcs from `node` up to where its way to the root meets that of `other` join the cycle from the even place `length`
  // on; returns the new length. Flow falls in even places: `lowest` becomes its lowest value, without branches, because
  // none could be foreseen.
  template <bool one_word>
  FEWSHOT_EXT_INLINE int64_t climb(int64_t node, int64_t other, int64_t length, Bottleneck& lowest) {
    const int64_t words = one_word ? 1 : words_;
    const Uint* const sets = one_word ? below_ : below_ + other / word_bits;
    const Link* const above = above_;
    const int64_t* const flow = flow_;
    int32_t* const cycle = cycle_;
    const auto meets = [&](const Link& link) { return sets[link.slot * words] >> (other % word_bits) & 1; };
    for (;;) {
      const Link falling = above[node];
      if (meets(falling)) return length;
      const int64_t here = flow[falling.slot], lower = -int64_t(here < lowest.flow);
      lowest.flow ^= (lowest.flow ^ here) & lower;
      lowest.place ^= (lowest.place ^ length) & lower;
      cycle[length++] = falling.slot;
      const Link rising = above[falling.parent];
      if (meets(rising)) return length;
      cycle[length++] = rising.slot;
      node = rising.parent;
    }
  }

  template <bool one_word>
  FEWSHOT_EXT_INLINE void pivot(const Arc& arc) {
    const int64_t row = arc.row, column = rows_ + arc.column;
    Bottleneck lowest{std::numeric_limits<int64_t>::max(), 0};
    int64_t length = climb<one_word>(row, column, 0, lowest);
    cycle_[length] = static_cast<int32_t>(nodes_);  // no arc: makes the number of places even
    const int64_t row_side = length + (length & 1);
    length = climb<one_word>(column, row, row_side, lowest);
    const int32_t leaving = cycle_[lowest.place];
    const bool row_moves = lowest.place < row_side;
    // First, because the next search for an arc reads what this writes.
    shift_potentials<one_word>(below_ + leaving * words_, row_moves ? arc.reduced_cost : -arc.reduced_cost);
    change_cycle<one_word>(length, leaving, lowest.flow);
    row_of[leaving] = static_cast<int32_t>(arc.row);
    column_of[leaving] = static_cast<int32_t>(arc.column);
    const int64_t end = row_moves ? row : column, new_parent = row_moves ? column : row;
    turn_links(end, {static_cast<int32_t>(new_parent), leaving}, leaving, [](int64_t) {});
  }

  // Flows and sets of the arcs on the cycle; the entering arc has the slot `leaving` afterwards.
  template <bool one_word>
  FEWSHOT_EXT_INLINE void change_cycle(int64_t length, int64_t leaving, int64_t change) {
    const int64_t words = one_word ? 1 : words_;
    Uint *const below = below_, *const moved = moved_;
    int64_t* const flow = flow_;
    const int32_t* const cycle = cycle_;
    std::copy(below + leaving * words, below + (leaving + 1) * words, moved);
    const Uint only = moved[0];
    int64_t rise = -change;
    for (int64_t k = 0; k < length; ++k) {
      const int64_t slot = cycle[k];
      flow[slot] += rise;
      rise = -rise;
      Uint* const set = below + slot * words;
      if constexpr (one_word) {
        *set ^= only;
      } else {
        for (int64_t w = 0; w < words; w += node_lanes) {
          UintVector a, b;
          std::memcpy(&a, set + w, sizeof(a));
          std::memcpy(&b, moved + w, sizeof(b));
          a ^= b;
          std::memcpy(set + w, &a, sizeof(a));
        }
      }
    }
    flow[leaving] = change;
    std::copy(moved, moved + words, below + leaving * words);
  }

  template <bool one_word>
  FEWSHOT_EXT_INLINE void shift_potentials(const Uint* moved, double change) {
    const UintVector lane_bits = (UintVector{} + 1) << lane_numbers<double>();
    const int64_t words = one_word ? 1 : words_;
    double* const potential = potential_;
    Float* const price = price_;
    for (int64_t w = 0; w < words; ++w) {
      Uint bits = moved[w];
      if (!one_word && bits == 0) continue;
      const int64_t begin = w * word_bits, end = std::min(begin + word_bits, padded_);
      for (int64_t k = begin; k < end; k += node_lanes, bits >>= node_lanes) {
        const auto inside = (lane_bits & bits) != 0;
        const Vector<double> before = load(potential + k);
        const Vector<double> after = inside ? before + change : before;
        store(potential + k, after);
        if constexpr (!std::is_same_v<Float, double>) {
          typedef Float Narrow __attribute__((vector_size(node_lanes * sizeof(Float))));
          const Narrow narrow = __builtin_convertvector(after, Narrow);
          std::memcpy(price + k, &narrow, sizeof(narrow));
        }
      }
    }
  }
  int64_t rows_, columns_, nodes_, padded_, words_, stride_;
  double tolerance_, largest_potential_;
  int64_t pivots_, next_row_;
  int64_t searches_ = 0;  // of all problems
  Uint* below_;           // [slots][words]: the nodes that the arc separates from the root
  Link* above_;           // [nodes]
  int64_t* flow_;         // [slots]
  int32_t* cycle_;        // [slots]
  Uint* moved_;           // [words]
  int32_t* order_;        // [nodes]
  int32_t* size_begin_;   // [nodes + 1]: where nodes begin in the order, by the number of nodes that are not below them
  double* potential_;     // [padded nodes]: u for rows, -v for columns
  Float* price_;          // the same, rounded; unused where Float is double
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
