// Primal simplex for one transportation problem. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
//
// A basis is a spanning tree of rows (suppliers) and columns (consumers). Its arcs have slots 0 .. rows + columns - 2,
// and each node keeps the set of slots on its way to the root as a bit mask. When the arc (i, j) enters,
//
//   the cycle            is path(i) ^ path(j),
//   the subtree cut off  are the nodes whose path has the slot that leaves, and
//   their new paths      are path ^ cycle without that slot, for the entering arc takes it over,
//
// so a pivot is a few vector operations over all nodes, and there is no tree to walk.
//
// Flows are integers: masses are scaled to the full width, and every row's supply is then raised by one unit of a finer
// grid, at the expense of one column's demand. With that perturbation no basic flow is ever 0 (a subtree without rows
// is a single column, and it has mass), so each pivot lowers the objective whatever the ties in the data, and no
// sequence of pivots can come back to a basis. Exact arithmetic makes this a proof and not a hope. The final tree is
// optimal for the problem as given, too; its flows and duals are computed from it anew.
#pragma once

#include "common/memory.h"
#include "common/simd.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

template <class T>
FEWSHOT_EXT_INLINE Vector<T> smaller(const Vector<T>& a, const Vector<T>& b) {
  return a < b ? a : b;
}

template <class T, int distance, class V, int... lane>
FEWSHOT_EXT_INLINE V lanes_apart(const V& v, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, (lane ^ distance)...);
#else
  constexpr typename Simd<T>::IntVector order = {(lane ^ distance)...};
  return __builtin_shuffle(v, order);
#endif
}

template <class T, int distance = Simd<T>::lanes / 2>
FEWSHOT_EXT_INLINE T horizontal_min(const Vector<T>& v) {
  if constexpr (distance == 0) {
    return v[0];
  } else {
    using Lanes = std::make_integer_sequence<int, Simd<T>::lanes>;
    return horizontal_min<T, distance / 2>(smaller<T>(v, lanes_apart<T, distance>(v, Lanes{})));
  }
}

// Float is what reduced costs are priced in: float for float32 costs, double for float64.
template <class Float>
class TransportSimplex {
  using Uint = typename Simd<double>::Uint;
  using UintVector = typename Simd<double>::UintVector;
  static constexpr int node_lanes = Simd<double>::lanes;
  static constexpr int word_bits = 64;

 public:
  static constexpr int cost_lanes = Simd<Float>::lanes;

  // Elements between rows of the cost matrix. The caller fills the columns beyond the last with `no_arc`.
  static int64_t cost_stride(int64_t columns) { return (columns + cost_lanes - 1) / cost_lanes * cost_lanes; }
  static constexpr Float no_arc = std::numeric_limits<Float>::infinity();

  template <class Arena>
  void lay_out(Arena& arena, int64_t most_rows, int64_t most_columns) {
    const int64_t nodes = most_rows + most_columns, padded = padded_nodes(most_rows, most_columns);
    const int64_t masks = words(nodes);
    cost = arena.template take<Float>(most_rows * cost_stride(most_columns));
    supply = arena.template take<int64_t>(most_rows);
    demand = arena.template take<int64_t>(most_columns);
    paths_ = arena.template take<Uint>(masks * padded);
    potential_ = arena.template take<double>(padded);
    price_ = arena.template take<Float>(padded);
    flow_ = arena.template take<int64_t>(masks * word_bits);
    row_of = arena.template take<int32_t>(nodes);
    column_of = arena.template take<int32_t>(nodes);
    child_is_row_ = arena.template take<Uint>(masks);
    cycle_ = arena.template take<Uint>(masks);
    closed_ = arena.template take<Float>(cost_stride(most_columns));
  }

  // The problem: cost [rows][cost_stride(columns)], masses as scale_masses makes them, largest the greatest |cost|.
  Float* cost;
  int64_t* supply;
  int64_t* demand;
  // The tree: slots [0, rows + columns - 1) hold the arcs (row_of, column_of).
  int32_t* row_of;
  int32_t* column_of;

  int64_t pivots() const { return pivots_; }
  double* potentials() { return potential_; }

  void begin(int64_t rows, int64_t columns, double tolerance) {
    rows_ = rows;
    columns_ = columns;
    stride_ = cost_stride(columns);
    nodes_ = rows + columns;
    padded_ = padded_nodes(rows, columns);
    words_ = words(nodes_);
    tolerance_ = tolerance;
    pivots_ = 0;
    next_row_ = 0;
    start();
  }

  // Pivots until no arc of negative reduced cost is found, in the arithmetic of Price. False: gave up.
  template <class Price>
  bool optimise(int64_t pivot_limit) {
    for (;;) {
      Arc arc;
      if (!find_entering<Price>(arc)) return true;
      if (pivots_++ == pivot_limit) return false;
      if (words_ == 1)
        pivot<true>(arc);
      else
        pivot<false>(arc);
    }
  }

  // The potentials have been set anew.
  void refresh() {
    for (int64_t k = 0; k < nodes_; ++k) price_[k] = static_cast<Float>(potential_[k]);
  }

 private:
  struct Arc {
    int64_t row, column;
    double reduced_cost;
  };

  // Vectors of column potentials may reach beyond the last column.
  static int64_t padded_nodes(int64_t rows, int64_t columns) {
    return (rows + cost_stride(columns) + cost_lanes - 1) / cost_lanes * cost_lanes;
  }

  static int64_t words(int64_t nodes) { return (nodes - 1 + word_bits - 1) / word_bits; }

  double reduced_cost(int64_t i, int64_t j) const {
    return double(cost[i * stride_ + j]) - potential_[i] + potential_[rows_ + j];
  }

  // Each row in turn is served by the cheapest columns that have demand left. In the perturbed problem each arc uses up
  // either its row or its column, and only the last one uses up both. So, backwards from the last arc, each arc joins
  // the node it used up to the tree.
  void start() {
    for (int64_t j = 0; j < stride_; ++j) closed_[j] = Float(0);
    int64_t slot = 0;
    for (int64_t i = 0; i < rows_; ++i) {
      int64_t left = supply[i];
      for (;;) {
        const int64_t j = cheapest_open_column(i);
        row_of[slot] = static_cast<int32_t>(i);
        column_of[slot] = static_cast<int32_t>(j);
        const int64_t moved = std::min(left, demand[j]);
        flow_[slot] = moved;
        left -= moved;
        demand[j] -= moved;
        const int64_t word = slot / word_bits;
        const Uint bit = Uint(1) << (slot % word_bits);
        if (word * word_bits == slot) child_is_row_[word] = 0;
        if (left == 0) child_is_row_[word] |= bit;
        ++slot;
        if (left == 0) break;
        closed_[j] = no_arc;
      }
    }
    std::memset(paths_, 0, sizeof(Uint) * words_ * padded_);
    for (int64_t k = 0; k < padded_; ++k) potential_[k] = 0;
    for (int64_t k = slot - 1; k >= 0; --k) {
      const int64_t word = k / word_bits, bit = k % word_bits;
      const bool new_row = child_is_row_[word] >> bit & 1;
      const int64_t row = row_of[k], column = rows_ + column_of[k];
      const int64_t child = new_row ? row : column, parent = new_row ? column : row;
      for (int64_t w = 0; w < words_; ++w) paths_[w * padded_ + child] = paths_[w * padded_ + parent];
      paths_[word * padded_ + child] |= Uint(1) << bit;
      const double c = cost[row * stride_ + column_of[k]];
      potential_[child] = potential_[parent] + (new_row ? c : -c);
    }
    refresh();
  }

  int64_t cheapest_open_column(int64_t i) const {
    const Float* row = cost + i * stride_;
    int64_t best = 0;
    Float lowest = std::numeric_limits<Float>::infinity();
    for (int64_t j = 0; j < columns_; ++j) {
      const Float c = row[j] + closed_[j];
      if (c < lowest) {
        lowest = c;
        best = j;
      }
    }
    return best;
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
    if constexpr (std::is_same_v<Price, Float>)
      return price_;
    else
      return potential_;
  }

  // The arc of lowest reduced cost in the first block of rows, counted from where the last search ended, that has one
  // below the tolerance.
  template <class Price>
  bool find_entering(Arc& arc) {
    using V = Vector<Price>;
    using Bits = typename Simd<Price>::Uint;
    using BitVector = typename Simd<Price>::UintVector;
    constexpr int lanes = Simd<Price>::lanes;
    constexpr int row_bits = 5, lane_bits = 4;
    const Price* potentials = prices<Price>();
    const Price* column_potentials = potentials + rows_;
    BitVector lane_numbers;
    for (int k = 0; k < lanes; ++k) lane_numbers[k] = Bits(k) << row_bits;
    for (int64_t scanned = 0; scanned < rows_;) {
      const int64_t first = next_row_;
      const int64_t count = std::min<int64_t>({block_rows, rows_ - first, rows_ - scanned});
      V best = splat(static_cast<Price>(-tolerance_));
      for (int64_t r = 0; r < count; ++r) {
        const Float* row = cost + (first + r) * stride_;
        V lowest = load_cost<Price>(row) + load<Price>(column_potentials);
        for (int64_t c = lanes; c < stride_; c += lanes)
          lowest = smaller<Price>(load_cost<Price>(row + c) + load<Price>(column_potentials + c), lowest);
        lowest -= potentials[first + r];
        // Numbers of row and lane in the last bits of the mantissa travel with the minimum.
        BitVector bits;
        std::memcpy(&bits, &lowest, sizeof(bits));
        bits = (bits & ~Bits((1 << (row_bits + lane_bits)) - 1)) | (lane_numbers + Bits(r));
        std::memcpy(&lowest, &bits, sizeof(bits));
        best = smaller<Price>(lowest, best);
      }
      scanned += count;
      next_row_ = first + count == rows_ ? 0 : first + count;
      const Price lowest = horizontal_min<Price>(best);
      if (!(lowest < static_cast<Price>(-tolerance_))) continue;
      Bits bits;
      std::memcpy(&bits, &lowest, sizeof(bits));
      arc.row = first + static_cast<int64_t>(bits & ((1 << row_bits) - 1));
      arc.reduced_cost = -tolerance_;
      arc.column = -1;
      for (int64_t j = bits >> row_bits & ((1 << lane_bits) - 1); j < columns_; j += lanes) {
        const double r = reduced_cost(arc.row, j);
        if (r < arc.reduced_cost) {
          arc.reduced_cost = r;
          arc.column = j;
        }
      }
      if (arc.column >= 0) return true;
    }
    return false;
  }

  template <bool one_word>
  void pivot(const Arc& arc) {
    const int64_t words = one_word ? 1 : words_;
    const int64_t entering_row = arc.row, entering_column = rows_ + arc.column;
    // Around the cycle, flow falls on the arcs that lead from their row to the entering row's side ...
    int64_t lowest = std::numeric_limits<int64_t>::max();
    int64_t leaving = 0;
    for (int64_t w = 0; w < words; ++w) {
      const Uint from_row = paths_[w * padded_ + entering_row], from_column = paths_[w * padded_ + entering_column];
      const Uint cycle = from_row ^ from_column;
      cycle_[w] = cycle;
      for (Uint falling = cycle & ~(from_row ^ child_is_row_[w]); falling; falling &= falling - 1) {
        const int64_t slot = w * word_bits + __builtin_ctzll(falling);
        if (flow_[slot] < lowest) {
          lowest = flow_[slot];
          leaving = slot;
        }
      }
    }
    const int64_t leaving_word = leaving / word_bits;
    const Uint leaving_bit = Uint(1) << (leaving % word_bits);
    const bool row_moves = paths_[leaving_word * padded_ + entering_row] & leaving_bit;
    const int64_t entering_end = row_moves ? entering_row : entering_column;
    const int64_t cut = child_is_row_[leaving_word] & leaving_bit ? row_of[leaving] : rows_ + column_of[leaving];
    for (int64_t w = 0; w < words; ++w) {
      const Uint from_row = paths_[w * padded_ + entering_row];
      const Uint falls = cycle_[w] & ~(from_row ^ child_is_row_[w]);
      for (Uint changing = cycle_[w]; changing; changing &= changing - 1) {
        const int slot = __builtin_ctzll(changing);
        flow_[w * word_bits + slot] += falls >> slot & 1 ? -lowest : lowest;
      }
      child_is_row_[w] ^= paths_[w * padded_ + entering_end] & ~paths_[w * padded_ + cut];
    }
    flow_[leaving] = lowest;
    row_of[leaving] = static_cast<int32_t>(arc.row);
    column_of[leaving] = static_cast<int32_t>(arc.column);
    child_is_row_[leaving_word] &= ~leaving_bit;
    if (row_moves) child_is_row_[leaving_word] |= leaving_bit;
    cycle_[leaving_word] &= ~leaving_bit;
    move_subtree<one_word>(leaving_word, leaving_bit, row_moves ? arc.reduced_cost : -arc.reduced_cost);
  }

  template <bool one_word>
  void move_subtree(int64_t leaving_word, Uint leaving_bit, double change) {
    const Uint* membership = paths_ + leaving_word * padded_;
    for (int64_t k = 0; k < padded_; k += node_lanes) {
      UintVector path;
      std::memcpy(&path, membership + k, sizeof(path));
      const auto inside = (path & leaving_bit) != 0;
      const Vector<double> before = load(potential_ + k);
      const Vector<double> after = inside ? before + change : before;
      store(potential_ + k, after);
      if constexpr (std::is_same_v<Float, double>) {
        store(price_ + k, after);
      } else {
        typedef Float Narrow __attribute__((vector_size(node_lanes * sizeof(Float))));
        const Narrow narrow = __builtin_convertvector(after, Narrow);
        std::memcpy(price_ + k, &narrow, sizeof(narrow));
      }
      if constexpr (one_word) {
        path ^= (UintVector)inside & cycle_[0];
        std::memcpy(paths_ + k, &path, sizeof(path));
      }
    }
    if constexpr (!one_word) {
      for (int64_t w = 0; w < words_; ++w) {
        if (w != leaving_word && cycle_[w]) flip_paths(w, membership, leaving_bit);
      }
      if (cycle_[leaving_word]) flip_paths(leaving_word, membership, leaving_bit);
    }
  }

  void flip_paths(int64_t w, const Uint* membership, Uint leaving_bit) {
    Uint* plane = paths_ + w * padded_;
    const Uint flip = cycle_[w];
    for (int64_t k = 0; k < padded_; k += node_lanes) {
      UintVector member, path;
      std::memcpy(&member, membership + k, sizeof(member));
      std::memcpy(&path, plane + k, sizeof(path));
      path ^= (UintVector)((member & leaving_bit) != 0) & flip;
      std::memcpy(plane + k, &path, sizeof(path));
    }
  }

 public:
  int64_t block_rows = 8;

 private:
  int64_t rows_, columns_, nodes_, padded_, words_, stride_;
  double tolerance_;
  int64_t pivots_, next_row_;
  Uint* paths_;         // [words][padded nodes]: slots on the way to the root
  Uint* child_is_row_;  // [words]: slots whose end away from the root is a row
  Uint* cycle_;         // [words]
  double* potential_;   // [padded nodes]: u for rows, -v for columns
  Float* price_;        // the same, rounded
  int64_t* flow_;       // [slots]
  Float* closed_;       // [stride]: no_arc where a column has no demand left
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
