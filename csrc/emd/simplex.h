// Primal simplex for one transportation problem. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
//
// A basis is a spanning tree of rows (suppliers) and columns (consumers). Its arcs have slots 0 .. rows + columns - 2.
// Each slot keeps the set of nodes on the far side of its arc, seen from the root, as bits, and what flows out of that
// set, which is negative where it flows in. When an arc enters and the slot that leaves has the set S,
//
//   the arc takes over the slot, and with it S, and
//   every other arc of the cycle gets the set (its own) ^ S,
//
// so there is no subtree to walk. An arc is on the cycle where its set has one of the entering arc's ends and not the
// other: where the sets are few words, a pivot looks at those of all slots, by vectors, with no branch that could not
// be foreseen; where they are many, it climbs from the two ends to where their ways to the root meet.
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
  static constexpr int row_bits = 5, lane_bits = 4, place_mask = (1 << (row_bits + lane_bits)) - 1;
  static constexpr int64_t block_rows = 16;
  static constexpr int rows_at_once = 4;
  // Words of sets up to which pivots look at those of all slots.
  static constexpr int64_t most_scanned = 4;

 public:
  static constexpr int cost_lanes = Simd<Float>::lanes;

  // Rows and columns of the cost matrix in memory. The caller fills those beyond the last with `no_arc`.
  static int64_t cost_rows(int64_t rows) { return (rows + rows_at_once - 1) / rows_at_once * rows_at_once; }
  static int64_t cost_stride(int64_t columns) { return (columns + cost_lanes - 1) / cost_lanes * cost_lanes; }
  static constexpr Float no_arc = std::numeric_limits<Float>::max() / 4;
  // Costs up to here keep every sum of costs along a tree of 2^15 nodes below `no_arc`.
  static constexpr Float largest_cost = no_arc / (1 << 16);

  template <class Arena>
  void lay_out(Arena& arena, int64_t most_rows, int64_t most_columns) {
    const int64_t nodes = most_rows + most_columns, padded = padded_nodes(most_rows, most_columns);
    const int64_t words = words_for(most_rows, most_columns), slots = padded_slots(nodes);
    supply = arena.template take<int64_t>(most_rows);
    demand = arena.template take<int64_t>(most_columns);
    row_of = arena.template take<int32_t>(nodes);
    column_of = arena.template take<int32_t>(nodes);
    sets_ = arena.template take<Uint>(slots * words);
    gathered_ = arena.template take<Uint>(padded * words);
    outflow_ = arena.template take<Uint>(slots);
    above_ = arena.template take<Link>(padded);
    cycle_ = arena.template take<Link>(nodes + 2);
    moved_ = arena.template take<Uint>(words);
    order_ = arena.template take<int32_t>(nodes);
    nodes_above_ = arena.template take<int32_t>(nodes);
    by_size_ = arena.template take<int32_t>(nodes);
    size_begin_ = arena.template take<int32_t>(nodes + 1);
    potential_ = arena.template take<double>(padded);
    price_ = arena.template take<Float>(padded);
  }

  // Bytes of the sets, which grow with the square of the number of nodes.
  static int64_t bytes_of_sets(int64_t rows, int64_t columns) {
    return (padded_slots(rows + columns) + padded_nodes(rows, columns)) * words_for(rows, columns) *
           int64_t(sizeof(Uint));
  }

  // Flows are multiples of 2 to this power: a slot's number fits in their last bits.
  static int slot_bits(int64_t rows, int64_t columns) {
    return 64 - __builtin_clzll(static_cast<uint64_t>(rows + columns));
  }

  // The problem: cost [rows][cost_stride(columns)], up to `largest_cost` in magnitude, and the perturbed masses. The
  // start uses the masses up.
  const Float* cost;
  int64_t* supply;
  int64_t* demand;
  // The tree: slots [0, rows + columns - 1) hold the arcs (row_of, column_of).
  int32_t* row_of;
  int32_t* column_of;

  int64_t pivots() const { return pivots_; }
  const double* row_potentials() const { return potential_; }
  const double* column_potentials() const { return potential_ + first_column_; }

  // False: was told to stop.
  bool begin(int64_t rows, int64_t columns, double largest, RegretStart<Float>& first, Cancellation& cancellation) {
    rows_ = rows;
    columns_ = columns;
    stride_ = cost_stride(columns);
    nodes_ = rows + columns;
    first_column_ = first_column(rows);
    padded_ = padded_nodes(rows, columns);
    words_ = words_for(rows, columns);
    slots_ = padded_slots(nodes_);
    slot_step_ = words_ <= most_scanned ? 1 : words_;
    word_step_ = words_ <= most_scanned ? slots_ : 1;
    slot_mask_ = (Uint(1) << slot_bits(rows, columns)) - 1;
    // Rounding of potentials, which are sums of costs along the tree, stays below this.
    tolerance_ = double(nodes_) * 0x1p-50 * largest;
    quick_tolerance_ = 0x1p-20 * largest;
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
      enter<Price>(arc);
      // Most often still worth a pivot, and cheaper than a search.
      if (best_of<Price>(runner_up, arc)) enter<Price>(arc);
    }
    return true;
  }

  // All nodes, row 0 first and each after its parent, the parents, and the potentials computed anew in this order:
  // pivots add up rounding. A parent comes first because more nodes are beyond its arc, seen from row 0, than beyond
  // its child's.
  const int32_t* renew_potentials(int32_t* parent) {
    // Row 0 becomes the root, and slots are sorted by the number of nodes that are not below them.
    std::fill(size_begin_, size_begin_ + nodes_ + 1, 0);
    for (int64_t w = 0; w < words_; ++w) moved_[w] = sets_[(nodes_ - 1) * slot_step_ + w * word_step_];
    for (int64_t slot = 0; slot < nodes_ - 1; ++slot) {
      Uint* const set = sets_ + slot * slot_step_;
      const Uint turned = -(*set & 1);
      int64_t above = nodes_;
      for (int64_t w = 0; w < words_; ++w) above -= __builtin_popcountll(set[w * word_step_] ^= moved_[w] & turned);
      outflow_[slot] = negated(outflow_[slot], turned);
      nodes_above_[slot] = static_cast<int32_t>(above);
      ++size_begin_[above + 1];
    }
    for (int64_t size = 1; size <= nodes_; ++size) size_begin_[size] += size_begin_[size - 1];
    for (int64_t slot = 0; slot < nodes_ - 1; ++slot)
      by_size_[size_begin_[nodes_above_[slot]]++] = static_cast<int32_t>(slot);
    potential_[0] = 0;
    order_[0] = parent[0] = 0;
    above_[0] = {0, static_cast<int32_t>(nodes_ - 1)};
    for (int64_t k = 1; k < nodes_; ++k) {
      const int64_t slot = by_size_[k - 1], row = row_of[slot], column = rows_ + column_of[slot];
      const bool is_row = reach_potential<double>(slot);
      order_[k] = static_cast<int32_t>(is_row ? row : column);
      parent[order_[k]] = static_cast<int32_t>(is_row ? column : row);
      link(slot, is_row);
    }
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
      int32_t* const depth = nodes_above_;
      int32_t deepest = depth[0] = 0;
      for (int64_t k = 1; k < nodes_; ++k) deepest = std::max(deepest, depth[order_[k]] = depth[parent[order_[k]]] + 1);
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

  // The node at the other end of the arc towards the root, and that arc's slot.
  struct Link {
    int32_t parent, slot;
  };

  // Nodes are rows first, then columns, from a whole vector of prices on.
  static int64_t first_column(int64_t rows) { return cost_stride(rows); }
  static int64_t padded_nodes(int64_t rows, int64_t columns) { return first_column(rows) + cost_stride(columns); }
  static int64_t words_for(int64_t rows, int64_t columns) {
    const int64_t words = (first_column(rows) + columns + word_bits - 1) / word_bits;
    if (words <= most_scanned) return words == 3 ? 4 : words;
    return (words + node_lanes - 1) / node_lanes * node_lanes;
  }
  // Those of the arcs, one above the root, and one that nobody asks for.
  static int64_t padded_slots(int64_t nodes) { return (nodes + node_lanes) / node_lanes * node_lanes; }

  // In the perturbed problem each arc of the first basis uses up either its row or its column, and the last one uses up
  // both. What hangs on the node that is used up is then complete.
  bool start(RegretStart<Float>& first, Cancellation& cancellation) {
    std::fill(gathered_, gathered_ + padded_ * words_, Uint(0));
    for (int64_t node = 0; node < padded_; ++node)
      gathered_[node * words_ + node / word_bits] = Uint(1) << (node % word_bits);
    std::fill(sets_, sets_ + slots_ * words_, Uint(0));
    int64_t slot = 0;
    const bool complete = first.run(cost, stride_, rows_, columns_, cancellation, [&](int64_t i, int64_t j) {
      row_of[slot] = static_cast<int32_t>(i);
      column_of[slot] = static_cast<int32_t>(j);
      const int64_t moved = std::min(supply[i], demand[j]), column = first_column_ + j;
      supply[i] -= moved;
      demand[j] -= moved;
      const bool row_used_up = supply[i] == 0;
      outflow_[slot] = static_cast<Uint>(row_used_up ? moved : -moved);
      gather(slot, row_used_up ? i : column, row_used_up ? column : i);
      link(slot, row_used_up);
      ++slot;
      return row_used_up;
    });
    if (!complete) return false;
    // Above the root is no arc, and everything is below it.
    const int64_t last = slot - 1, root = is_row_in_set(last) ? first_column_ + column_of[last] : row_of[last];
    above_[root] = {static_cast<int32_t>(root), static_cast<int32_t>(slot)};
    outflow_[slot] = 0;
    gather(slot, root, root);
    std::fill(potential_, potential_ + padded_, 0.0);
    std::fill(price_, price_ + padded_, Float(0));
    while (slot > 0) reach_potential<Float>(--slot);
    return true;
  }

  void gather(int64_t slot, int64_t child, int64_t parent) {
    const Uint* const from = gathered_ + child * words_;
    Uint* const to = gathered_ + parent * words_;
    for (int64_t w = 0; w < words_; ++w) {
      sets_[slot * slot_step_ + w * word_step_] = from[w];
      to[w] |= from[w];
    }
  }

  bool is_row_in_set(int64_t slot) const { return static_cast<int64_t>(outflow_[slot]) > 0; }

  void link(int64_t slot, bool is_row) {
    const int32_t row = row_of[slot], column = static_cast<int32_t>(first_column_) + column_of[slot];
    above_[is_row ? row : column] = {is_row ? column : row, static_cast<int32_t>(slot)};
  }

  // The potential of the node in the slot's set, from that of the arc's other end; whether it is a row.
  template <class Price>
  FEWSHOT_EXT_INLINE bool reach_potential(int64_t slot) {
    const int64_t i = row_of[slot], j = column_of[slot];
    const Price c = cost[i * stride_ + j];
    Price &row = prices<Price>()[i], &column = prices<Price>()[first_column_ + j];
    const bool is_row = is_row_in_set(slot);
    if (is_row)
      row = column + c;
    else
      column = row - c;
    return is_row;
  }

  static FEWSHOT_EXT_INLINE UintVector load_words(const Uint* from) {
    UintVector v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  }

  // The top bits in place of all others.
  static FEWSHOT_EXT_INLINE UintVector spread(UintVector top) {
    using IntVector = typename Simd<double>::IntVector;
    return UintVector(IntVector(top) >> (word_bits - 1));
  }

  // Where a node is in the sets: the word of each slot, and by how much its bit is to be shifted to the top.
  struct Member {
    const Uint* words;
    Uint shift;
    FEWSHOT_EXT_INLINE UintVector top(int64_t from) const { return load_words(words + from) << shift; }
  };
  FEWSHOT_EXT_INLINE Member member(int64_t node) const {
    const Uint number = static_cast<Uint>(node);
    return {sets_ + number / word_bits * static_cast<Uint>(word_step_), word_bits - 1 - number % word_bits};
  }

  // Where `mask` has all bits.
  template <class Words>
  static FEWSHOT_EXT_INLINE Words negated(Words v, Words mask) {
    return (v ^ mask) - mask;
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
  double tolerance_of() const {
    return std::is_same_v<Price, double> ? tolerance_ : quick_tolerance_;
  }

  template <class Price>
  Price* prices() const {
    if constexpr (std::is_same_v<Price, double>)
      return potential_;
    else
      return price_;
  }

  // In each lane the lowest reduced cost of the block, or of the limits, with its place. Prices of as many vectors of
  // columns as are given stay in registers.
  template <class Price, int fixed_vectors>
  FEWSHOT_EXT_INLINE IntVector<Price> lowest_of_block(int64_t first, int64_t count, IntVector<Price> best) const {
    using V = Vector<Price>;
    using Int = typename Simd<Price>::Int;
    constexpr int lanes = Simd<Price>::lanes, at_once = rows_at_once;
    const int64_t stride = fixed_vectors ? fixed_vectors * lanes : stride_;
    const Price* const row_prices = prices<Price>() + first;
    const Price* const column_prices = prices<Price>() + first_column_;
    V columns[fixed_vectors ? fixed_vectors : 1];
    for (int k = 0; k < fixed_vectors; ++k) columns[k] = load(column_prices + k * lanes);
    IntVector<Price> places = lane_numbers<Price>() << row_bits;
    const Float* from = cost + first * stride;
    // Rows beyond the last have costs that never win.
    for (int64_t r = 0; r < count; r += at_once, from += at_once * stride) {
      V lowest[at_once];
#pragma GCC unroll 4
      for (int k = 0; k < at_once; ++k) lowest[k] = splat(static_cast<Price>(no_arc));
#pragma GCC unroll 2
      for (int64_t c = 0; c < stride; c += lanes) {
        const V column = fixed_vectors ? columns[fixed_vectors ? c / lanes : 0] : load(column_prices + c);
#pragma GCC unroll 4
        for (int k = 0; k < at_once; ++k)
          lowest[k] = smaller<Price>(load_cost<Price>(from + k * stride + c) + column, lowest[k]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < at_once; ++k) {
        best = smaller_of(pack_index<Price>(lowest[k] - row_prices[r + k], places, place_mask), best);
        places += Int(1);
      }
    }
    return best;
  }

  // The arc of lowest reduced cost in the first block of rows, counted from where the last search ended, that has one
  // below the tolerance.
  template <class Price>
  bool find_entering(Arc& arc, Candidate& runner_up) {
    using Int = typename Simd<Price>::Int;
    using IntV = IntVector<Price>;
    const int64_t rows = rows_, block = words_ == 1 ? 2 * block_rows : block_rows;
    const IntV limits = pack_index<Price>(splat(static_cast<Price>(-tolerance_of<Price>())), IntV{}, place_mask);
    const Int limit = limits[0];
    for (int64_t scanned = 0; scanned < rows;) {
      const int64_t first = next_row_;
      const int64_t count = std::min<int64_t>({block, rows - first, rows - scanned});
      IntV best;
      switch (stride_ / Simd<Price>::lanes) {
        case 1:
          best = lowest_of_block<Price, 1>(first, count, limits);
          break;
        case 2:
          best = lowest_of_block<Price, 2>(first, count, limits);
          break;
        default:
          best = lowest_of_block<Price, 0>(first, count, limits);
      }
      scanned += count;
      next_row_ = first + count == rows ? 0 : first + count;
      IntV second = limits;
      two_lowest_in_lanes<Price>(best, second);
      const Int lowest = best[0], next = second[0];
      if (!(lowest < limit)) continue;
      runner_up = candidate<Price>(next, first);
      if (next == limit) runner_up.column = stride_;
      if (best_of<Price>(candidate<Price>(lowest, first), arc)) return true;
    }
    return false;
  }

  template <class Price>
  static Candidate candidate(typename Simd<Price>::Int packed, int64_t first_row) {
    return {first_row + static_cast<int64_t>(packed & ((1 << row_bits) - 1)),
            static_cast<int64_t>(packed >> row_bits & ((1 << lane_bits) - 1))};
  }

  // The candidate's arc of lowest reduced cost, if that is below the tolerance; in double, from the potentials as they
  // are by now.
  template <class Price>
  FEWSHOT_EXT_INLINE bool best_of(const Candidate& candidate, Arc& arc) const {
    const Price* const columns = prices<Price>() + first_column_;
    const Price row = prices<Price>()[candidate.row];
    const Float* const costs = cost + candidate.row * stride_;
    Price lowest = static_cast<Price>(-tolerance_of<Price>());
    int64_t column = -1;
    // Without branches, because none could be foreseen. To the end of the padding, which never wins, so that the number
    // of turns is always the same.
    for (int64_t j = candidate.column; j < stride_; j += Simd<Price>::lanes) {
      const Price r = (static_cast<Price>(costs[j]) + columns[j]) - row;
      const bool lower = r < lowest;
      lowest = lower ? r : lowest;
      column ^= (column ^ j) & -int64_t(lower);
    }
    arc = {candidate.row, column, lowest};
    return column >= 0;
  }

  template <class Price>
  FEWSHOT_EXT_INLINE void enter(const Arc& arc) {
    ++pivots_;
    switch (words_) {
      case 1:
        return pivot_by_scan<Price, 1>(arc);
      case 2:
        return pivot_by_scan<Price, 2>(arc);
      case 4:
        return pivot_by_scan<Price, 4>(arc);
      default:
        return pivot_by_climb<Price>(arc);
    }
  }

  template <class Price, int words>
  FEWSHOT_EXT_INLINE void pivot_by_scan(const Arc& arc) {
    const int64_t slots = slots_, row = arc.row, column = first_column_ + arc.column;
    Uint *const sets = sets_, *const outflow = outflow_;
    const Member in_row = member(row), in_column = member(column);
    constexpr Uint top_bit = Uint(1) << (word_bits - 1);
    // The least flow that the entering arc takes over, out of sets with the row or into sets with the column, and its
    // slot in the last bits. Flows the other way, and those that are not on the cycle, are large as unsigned numbers.
    UintVector least = ~UintVector{}, numbers = UintVector(lane_numbers<double>());
    for (int64_t k = 0; k < slots; k += node_lanes) {
      const UintVector column_top = in_column.top(k), cycle_top = in_row.top(k) ^ column_top;
      const UintVector falling = negated(load_words(outflow + k), spread(column_top)) | numbers;
      least = smaller_of(falling | (~cycle_top & top_bit), least);
      numbers += Uint(node_lanes);
    }
    const Uint lowest = lowest_in_lanes<double>(least)[0], change = lowest & ~slot_mask_;
    const auto leaving = static_cast<int64_t>(lowest & slot_mask_);
    Uint moved[words];
    for (int w = 0; w < words; ++w) moved[w] = sets[w * slots + leaving];
    const Uint row_moves = in_row.words[leaving] << in_row.shift >> (word_bits - 1);
    // First, because the next search for an arc reads what this writes.
    shift_prices<Price>(moved, words, arc, row_moves);
    // The arcs from the end that moves to the one that leaves lead the other way now.
    const int64_t leaving_ends[] = {first_column_ + column_of[leaving], row_of[leaving]}, ends[] = {column, row};
    const Member end = member(ends[row_moves]), leaving_end = member(leaving_ends[row_moves]);
    for (int64_t k = 0; k < slots; k += node_lanes) {
      const UintVector has_row = spread(in_row.top(k)), has_column = spread(in_column.top(k));
      const UintVector flow = load_words(outflow + k) - (has_row & change) + (has_column & change);
      store(outflow + k, negated(flow, spread(end.top(k) ^ leaving_end.top(k))));
      for (int w = 0; w < words; ++w)
        store(sets + w * slots + k, load_words(sets + w * slots + k) ^ ((has_row ^ has_column) & moved[w]));
    }
    for (int w = 0; w < words; ++w) sets[w * slots + leaving] = moved[w];
    replace(leaving, arc, negated(change, row_moves - 1));
  }

  FEWSHOT_EXT_INLINE void replace(int64_t leaving, const Arc& arc, Uint outflow) {
    outflow_[leaving] = outflow;
    row_of[leaving] = static_cast<int32_t>(arc.row);
    column_of[leaving] = static_cast<int32_t>(arc.column);
  }

  struct Bottleneck {
    int64_t flow, place;
  };

  // Arcs from `node` up to where its way to the root meets that of `other` join the cycle from the even place `length`
  // on, each with its lower node; returns the new length. Flow falls in even places: `lowest` becomes its lowest value,
  // without branches, because none could be foreseen.
  FEWSHOT_EXT_INLINE int64_t climb(int64_t node, int64_t other, int64_t length, Bottleneck& lowest) {
    const int64_t words = words_;
    const Uint* const sets = sets_ + other / word_bits;
    const Link* const above = above_;
    const Uint* const outflow = outflow_;
    Link* const cycle = cycle_;
    const auto meets = [&](const Link& link) { return sets[link.slot * words] >> (other % word_bits) & 1; };
    for (;;) {
      const Link falling = above[node];
      if (meets(falling)) return length;
      const int64_t here = std::abs(static_cast<int64_t>(outflow[falling.slot])), lower = -int64_t(here < lowest.flow);
      lowest.flow ^= (lowest.flow ^ here) & lower;
      lowest.place ^= (lowest.place ^ length) & lower;
      cycle[length++] = {static_cast<int32_t>(node), falling.slot};
      const Link rising = above[falling.parent];
      if (meets(rising)) return length;
      cycle[length++] = {falling.parent, rising.slot};
      node = rising.parent;
    }
  }

  template <class Price>
  FEWSHOT_EXT_INLINE void pivot_by_climb(const Arc& arc) {
    const int64_t words = words_, row = arc.row, column = first_column_ + arc.column;
    Bottleneck lowest{std::numeric_limits<int64_t>::max(), 0};
    int64_t length = climb(row, column, 0, lowest);
    cycle_[length] = {0, static_cast<int32_t>(nodes_)};  // no arc: makes the number of places even
    const int64_t row_side = length + (length & 1);
    length = climb(column, row, row_side, lowest);
    Link *const above = above_, *const cycle = cycle_;
    const int64_t leaving = cycle[lowest.place].slot;
    const bool row_moves = lowest.place < row_side;
    Uint *const sets = sets_, *const outflow = outflow_, *const moved = moved_;
    for (int64_t w = 0; w < words; w += node_lanes) store(moved + w, load_words(sets + leaving * words + w));
    // First, because the next search for an arc reads what this writes.
    shift_prices<Price>(moved, words, arc, row_moves);
    // The arcs from the end that moves to the one that leaves lead the other way now.
    const int64_t begin = row_moves ? 0 : row_side, turned = lowest.place - begin;
    for (int64_t k = 0; k < length; ++k) {
      const int64_t slot = cycle[k].slot;
      const Uint flow = outflow[slot] + (k < row_side ? -Uint(lowest.flow) : Uint(lowest.flow));
      outflow[slot] = negated(flow, -Uint(Uint(k - begin) < Uint(turned)));
      Uint* const set = sets + slot * words;
      for (int64_t w = 0; w < words; w += node_lanes) store(set + w, load_words(set + w) ^ load_words(moved + w));
    }
    for (int64_t w = 0; w < words; w += node_lanes) store(sets + leaving * words + w, load_words(moved + w));
    for (int64_t k = lowest.place; k > begin; --k) above[cycle[k].parent] = {cycle[k - 1].parent, cycle[k - 1].slot};
    replace(leaving, arc, row_moves ? Uint(lowest.flow) : -Uint(lowest.flow));
    link(leaving, row_moves);
  }

  // Those of the nodes in the set `moved`.
  template <class Price>
  FEWSHOT_EXT_INLINE void shift_prices(const Uint* moved, int64_t words, const Arc& arc, Uint row_moves) {
    using Bits = typename Simd<Price>::UintVector;
    constexpr int lanes = Simd<Price>::lanes;
    const Bits lane_bits = (Bits{} + 1) << Bits(lane_numbers<Price>());
    const int64_t padded = padded_;
    constexpr Price signs[] = {-1, 1};
    const Price change = signs[row_moves] * static_cast<Price>(arc.reduced_cost);
    Price* const price = prices<Price>();
    for (int64_t w = 0; w < words; ++w) {
      Uint bits = moved[w];
      if (words > 1 && bits == 0) continue;
      const int64_t begin = w * word_bits, end = std::min(begin + word_bits, padded);
      for (int64_t k = begin; k < end; k += lanes, bits >>= lanes) {
        const Vector<Price> before = load(price + k);
        store(price + k, (lane_bits & static_cast<typename Simd<Price>::Uint>(bits)) != 0 ? before + change : before);
      }
    }
  }

  int64_t rows_, columns_, nodes_, first_column_, padded_, words_, slots_, slot_step_, word_step_, stride_;
  Uint slot_mask_;
  double tolerance_, quick_tolerance_, largest_potential_;
  int64_t pivots_, next_row_;
  int64_t searches_ = 0;  // of all problems
  Uint* sets_;            // [slots][words], or [words][slots]: the nodes that the arc separates from the root
  Uint* outflow_;         // [slots]: signed, out of the set
  Uint* gathered_;        // [padded nodes][words]: what hangs on a node while the first tree grows
  Uint* moved_;           // [words]
  Link* above_;           // [padded nodes]: kept up where pivots climb
  Link* cycle_;           // [slots]: the arcs, and their lower nodes
  int32_t* order_;        // [nodes]
  int32_t* nodes_above_;  // [slots]: those that are not in the set
  int32_t* by_size_;      // [nodes]: slots
  int32_t* size_begin_;   // [nodes + 1]: where slots begin in by_size_, by the number of nodes above
  double* potential_;     // [padded nodes]: u for rows, -v for columns
  Float* price_;          // the same, rounded; unused where Float is double
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
