// Primal simplex for one transportation problem in arithmetic that does not round. Included inside
// FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
//
// TransportSimplex is fast and right up to a rounding of the largest cost times the whole mass. Where that is too much,
// this one goes on from its tree: potentials and flows are integers of as many words as the problem's numbers need, in
// units of the lowest bit of any cost and of any mass. Reduced costs are looked at in double, with a bound on what
// rounding can have done to them; only where their sign is in doubt are they computed exactly. Masses that differ in
// their total are multiplied by each other's total instead of divided by their own.
//
// Costs have two levels: first the number of forbidden arcs, then what the others cost. Levels are small integers of
// their own, so that infinity needs no number that stands for it.
//
// The tree is kept by parents and lists of children: its memory grows with the number of nodes, and a pivot walks
// through the subtree that it moves. Nodes are rows first, then columns; the arc of a node leads to its parent.
//
// A Machine is what solves one problem: a thread of a processor (cpu_machine.h), or the lanes of a warp (exact.cuh).
// All its lanes call what takes one. They look for arcs together, each at its share of a row; all that changes the
// object, of which there is one, is done by one of them.
#pragma once

#include "common/host_device.h"
#include "common/memory.h"
#include "emd/wide.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// A row of costs as Machine::lowest_of_row() looks at it: beside the duals of the columns and their levels, all as
// ExactSimplex keeps them.
template <class Float>
struct ExactRow {
  const Float* cost;
  const double* columns;
  const int32_t* levels;
  int64_t count, padded_count;
  double dual, limit;  // of the row; of the costs that are no stand-ins
  int32_t level;
  double factor, constant;  // of the error
};

// Source has cost(row, column), infinity where the arc is forbidden, supply(row) and demand(column), as they are given.
template <class Float, class Source, class Machine>
class ExactSimplex {
 public:
  struct Problem {
    int64_t rows, columns;
    // [rows][stride], the costs times 2^cost_exponent with a stand-in above `largest` for infinity.
    const Float* cost;
    int64_t stride;
    int64_t cost_exponent;
    Float largest;
    bool forbids;  // some arc
    // Row and column that take what the other side has more of, or -1 both.
    int64_t dummy_row, dummy_column;
  };

  FEWSHOT_EXT_HOST_DEVICE void prepare(const Source& source, const Problem& problem, Machine& machine) {
    BitRange costs, masses;
    for (int64_t i = 0; i < problem.rows; ++i) {
      for (int64_t j = machine.lane(); j < problem.columns; j += Machine::lanes) {
        const double c = source.cost(i, j);
        if (c <= std::numeric_limits<double>::max()) costs.include(c);
      }
    }
    costs.lowest = machine.least(costs.lowest);
    costs.above_highest = ~machine.least(~costs.above_highest);
    machine.one([&] {
      source_ = &source;
      p_ = problem;
      nodes_ = p_.rows + p_.columns;
      for (int64_t k = 0; k < nodes_; ++k)
        if (!is_dummy(k)) masses.include(mass(k));
      set_sizes(costs, masses);
      ByteArena sizes{};
      lay_out(sizes);
      ByteArena arena{{machine.memory(sizes.bytes.used)}};
      lay_out(arena);
      pivots_ = next_row_ = next_exact_row_ = 0;
      load_masses();
      std::fill(left_, left_ + nodes_ * flow_words_, Word(0));
      for (int64_t k = 0; k < nodes_; ++k) perturbed_mass(k, left_ + k * flow_words_);
      served_ = 0;
    });
  }

  // What Machine::memory() is asked for at most, with numbers of this range.
  FEWSHOT_EXT_HOST_DEVICE static int64_t most_bytes(int64_t rows, int64_t columns, int64_t stride,
                                                    const BitRange& numbers) {
    ExactSimplex simplex;
    simplex.p_ = {rows, columns, nullptr, stride, 0, 0, false, -1, -1};
    simplex.nodes_ = rows + columns;
    simplex.set_sizes(numbers, numbers);
    ByteArena sizes{};
    simplex.lay_out(sizes);
    return sizes.bytes.used;
  }

  // The first tree, arc by arc: each moves what it can, and uses up its row or its column. Arcs between nodes of which
  // one is used up are left out, and finish_start() adds what is missing.
  FEWSHOT_EXT_HOST_DEVICE bool is_open(int64_t node) const {
    return !wide_is_zero(left_ + node * flow_words_, flow_words_);
  }
  // Whether the row has nothing left.
  FEWSHOT_EXT_HOST_DEVICE bool serve(int64_t i, int64_t j) {
    const int64_t column = p_.rows + j, words = flow_words_;
    Word *const have = left_ + i * words, *const want = left_ + column * words;
    const bool row_used_up = !wide_is_less(want, have, words);
    const int64_t child = row_used_up ? i : column;
    std::copy(row_used_up ? have : want, (row_used_up ? have : want) + words, flow_ + child * words);
    wide_subtract(row_used_up ? want : have, flow_ + child * words, words);
    std::fill_n(row_used_up ? have : want, words, Word(0));
    parent_[child] = static_cast<int32_t>(row_used_up ? column : i);
    order_[served_++] = static_cast<int32_t>(child);
    return row_used_up;
  }

  FEWSHOT_EXT_HOST_DEVICE void finish_start() {
    for (int64_t i = 0; i < p_.rows; ++i) {
      while (is_open(i)) {
        int64_t cheapest = -1;
        for (int64_t j = 0; j < p_.columns; ++j)
          if (is_open(p_.rows + j) && (cheapest < 0 || stored(i, j) < stored(i, cheapest))) cheapest = j;
        serve(i, cheapest);
      }
    }
    // The last arc used up both its ends.
    root_ = parent_[order_[nodes_ - 2]];
    parent_[root_] = -1;
    order_[nodes_ - 1] = static_cast<int32_t>(root_);
    std::reverse(order_, order_ + nodes_);
    std::fill(first_child_, first_child_ + nodes_, -1);
    std::fill(potential_, potential_ + nodes_ * cost_words_, Word(0));
    for (int64_t k = 1; k < nodes_; ++k) attach(order_[k], parent_[order_[k]]);
    // Columns of the padding never win.
    std::fill(approximate_ + nodes_, approximate_ + p_.rows + p_.stride, std::numeric_limits<double>::max() / 2);
    std::fill(level_ + nodes_, level_ + p_.rows + p_.stride, 1 << 24);
    approximate_[root_] = 0;
    depth_[root_] = 0;
    level_[root_] = 0;
    for (int64_t k = 1; k < nodes_; ++k) {
      const int64_t node = order_[k], parent = parent_[node];
      const double c = arc_cost(node);
      Word* const to = potential_ + node * cost_words_;
      std::copy(potential_ + parent * cost_words_, potential_ + (parent + 1) * cost_words_, to);
      level_[node] = level_[parent];
      if (c > std::numeric_limits<double>::max())
        level_[node] += node < p_.rows ? 1 : -1;
      else
        wide_add_double(to, cost_words_, c, cost_unit_, node >= p_.rows);
      depth_[node] = depth_[parent] + 1;
      approximate(node);
    }
  }

  // Pivots until no arc has a negative reduced cost. False: gave up, or was told to.
  FEWSHOT_EXT_HOST_DEVICE bool optimize(int64_t pivot_limit, Machine& machine) {
    for (;;) {
      int64_t i, j;
      if (machine.stopped()) return false;
      if (!(p_.forbids ? find_entering<true>(i, j, machine) : find_entering<false>(i, j, machine)))
        return !machine.stopped();
      if (pivots_ >= pivot_limit) return false;
      machine.one([&] {
        ++pivots_;
        pivot(i, j);
      });
    }
  }

  // With the tree optimal: flows of the masses as they are, and row 0 as its root. With dummies, the dual of the
  // column's, or the row's, becomes 0.
  FEWSHOT_EXT_HOST_DEVICE void finish(bool of_dummy_column) {
    reroot(0);
    int64_t count = 0, waiting = 0;
    stack_[waiting++] = 0;
    while (waiting > 0) {
      const int32_t node = stack_[--waiting];
      order_[count++] = node;
      for (int32_t child = first_child_[node]; child >= 0; child = next_sibling_[child]) stack_[waiting++] = child;
    }
    for (int64_t k = 0; k < nodes_; ++k) plain_mass(k, left_ + k * flow_words_);
    for (int64_t k = nodes_ - 1; k > 0; --k) {
      const int64_t node = order_[k];
      wide_subtract(left_ + parent_[node] * flow_words_, left_ + node * flow_words_, flow_words_);
    }
    if (p_.forbids) unite_levels();
    if (p_.dummy_row < 0)
      find_means();
    else
      start_duals_at(of_dummy_column ? p_.rows + p_.dummy_column : p_.dummy_row);
  }

  FEWSHOT_EXT_HOST_DEVICE const int32_t* order() const { return order_; }
  FEWSHOT_EXT_HOST_DEVICE int64_t parent(int64_t node) const { return parent_[node]; }
  FEWSHOT_EXT_HOST_DEVICE int64_t pivots() const { return pivots_; }

  // Results, in the units of the problem. The flow on the arc of a node:
  FEWSHOT_EXT_HOST_DEVICE double flow(int64_t node) const {
    return wide_value(left_ + node * flow_words_, flow_words_).over(divisor_, mass_unit_);
  }

  // The cost of all flows on arcs that are not forbidden; infinity beyond the range of a double.
  FEWSHOT_EXT_HOST_DEVICE double value() {
    const int64_t words = flow_words_ + cost_words_ + 1;
    std::fill(sum_, sum_ + words, Word(0));
    for (int64_t k = 1; k < nodes_; ++k) {
      const double c = arc_cost(order_[k]);
      const Binary cost(c);
      if (cost.mantissa == 0 || c > std::numeric_limits<double>::max()) continue;
      const int64_t zeros = zeros_below(cost.mantissa);
      wide_add_product(sum_, words, left_ + order_[k] * flow_words_, flow_words_, cost.mantissa >> zeros,
                       cost.exponent + zeros - cost_unit_, cost.negative);
    }
    return wide_value(sum_, words).over(divisor_, mass_unit_ + cost_unit_);
  }

  // u of a row, v of a column: with the mean of the one equal to that of the other, or 0 for a dummy.
  FEWSHOT_EXT_HOST_DEVICE double dual(int64_t node) {
    const int64_t words = cost_words_ + 2;
    Word *const to = sum_, *const own = sum_ + words;
    widen(potential_ + node * cost_words_, own);
    wide_multiply(to, own, words, Word(2));
    wide_multiply(own, to, words, Word(p_.rows) * Word(p_.columns));
    wide_subtract(own, means_, words);
    const double scaled =
        wide_value(own, words).over(Scaled{2.0 * double(p_.rows) * double(p_.columns), 0}, cost_unit_);
    return node < p_.rows ? scaled : -scaled;
  }

 private:
  static constexpr int64_t block_rows = 16;

  FEWSHOT_EXT_HOST_DEVICE void set_sizes(const BitRange& costs, const BitRange& masses) {
    const int64_t node_bits = bits_of_count(nodes_);
    cost_unit_ = costs.unit();
    const int64_t cost_bits = costs.bits() + 2 * node_bits + 4;
    cost_words_ = words_for_bits(cost_bits);
    // Every sum of costs is then a double.
    sums_are_exact_ = costs.bits() + node_bits + 2 <= 53 && p_.cost_exponent == 0;
    mass_unit_ = masses.unit();
    perturbation_bits_ = bits_of_count(p_.rows);
    const int64_t mass_bits = masses.bits() + node_bits;
    total_words_ = words_for_bits(mass_bits);
    flow_words_ = words_for_bits(2 * mass_bits + perturbation_bits_ + 2);
  }

  FEWSHOT_EXT_HOST_DEVICE void lay_out(ByteArena& arena) {
    parent_ = arena.template take<int32_t>(nodes_);
    first_child_ = arena.template take<int32_t>(nodes_);
    next_sibling_ = arena.template take<int32_t>(nodes_);
    last_sibling_ = arena.template take<int32_t>(nodes_);
    depth_ = arena.template take<int32_t>(nodes_);
    order_ = arena.template take<int32_t>(nodes_);
    stack_ = arena.template take<int32_t>(nodes_);
    level_ = arena.template take<int32_t>(p_.rows + p_.stride);
    approximate_ = arena.template take<double>(p_.rows + p_.stride);
    potential_ = arena.template take<Word>(nodes_ * cost_words_);
    flow_ = arena.template take<Word>(nodes_ * flow_words_);
    left_ = arena.template take<Word>(nodes_ * flow_words_);
    supply_total_ = arena.template take<Word>(total_words_);
    demand_total_ = arena.template take<Word>(total_words_);
    change_ = arena.template take<Word>(Machine::lanes * cost_words_);
    moved_ = arena.template take<Word>(flow_words_);
    means_ = arena.template take<Word>(cost_words_ + 2);
    sum_ = arena.template take<Word>(2 * (cost_words_ + 2) + flow_words_);
  }

  // Masses, in units of 2^mass_unit_.

  FEWSHOT_EXT_HOST_DEVICE bool is_dummy(int64_t node) const {
    return p_.dummy_row >= 0 && (node == p_.dummy_row || node == p_.rows + p_.dummy_column);
  }
  FEWSHOT_EXT_HOST_DEVICE double mass(int64_t node) const {
    return node < p_.rows ? source_->supply(node) : source_->demand(node - p_.rows);
  }

  FEWSHOT_EXT_HOST_DEVICE void load_masses() {
    const int64_t words = total_words_;
    std::fill(supply_total_, supply_total_ + words, Word(0));
    std::fill(demand_total_, demand_total_ + words, Word(0));
    for (int64_t k = 0; k < nodes_; ++k)
      if (!is_dummy(k)) wide_add_double(k < p_.rows ? supply_total_ : demand_total_, words, mass(k), mass_unit_);
    scaled_ = p_.dummy_row < 0 && !std::equal(supply_total_, supply_total_ + words, demand_total_);
    const Word one = 1;
    divisor_ = scaled_ ? wide_value(demand_total_, words) : wide_value(&one, 1);
  }

  // to = the mass of a node, which is that of a balanced problem times the divisor.
  FEWSHOT_EXT_HOST_DEVICE void plain_mass(int64_t node, Word* to) const {
    std::fill(to, to + flow_words_, Word(0));
    const bool row = node < p_.rows;
    if (is_dummy(node)) {
      const Word one = 1;
      wide_add_product(to, flow_words_, row ? demand_total_ : supply_total_, total_words_, one, 0, false);
      wide_add_product(to, flow_words_, row ? supply_total_ : demand_total_, total_words_, one, 0, true);
      if (wide_is_negative(to, flow_words_)) std::fill(to, to + flow_words_, Word(0));
    } else if (scaled_) {
      const Binary own(mass(node));
      const int64_t zeros = zeros_below(own.mantissa);
      wide_add_product(to, flow_words_, row ? demand_total_ : supply_total_, total_words_, own.mantissa >> zeros,
                       own.exponent + zeros - mass_unit_, false);
    } else {
      wide_add_double(to, flow_words_, mass(node), mass_unit_);
    }
  }

  // Rows get one unit more of a finer grid, at the expense of one column, as in TransportSimplex. A dummy column, which
  // may have no other mass, is that one.
  FEWSHOT_EXT_HOST_DEVICE void perturbed_mass(int64_t node, Word* to) {
    plain_mass(node, moved_);
    const Word one = 1;
    wide_add_product(to, flow_words_, moved_, flow_words_, one, perturbation_bits_, false);
    const int64_t column = p_.rows + std::max<int64_t>(p_.dummy_column, 0);
    const Word units = node < p_.rows ? 1 : node == column ? Word(p_.rows) : 0;
    wide_add_product(to, flow_words_, &units, 1, one, 0, false);
  }

  // Costs.

  FEWSHOT_EXT_HOST_DEVICE double stored(int64_t i, int64_t j) const { return p_.cost[i * p_.stride + j]; }
  FEWSHOT_EXT_HOST_DEVICE double arc_cost(int64_t node) const {
    const int64_t parent = parent_[node];
    return node < p_.rows ? source_->cost(node, parent - p_.rows) : source_->cost(parent, node - p_.rows);
  }
  FEWSHOT_EXT_HOST_DEVICE bool is_tree_arc(int64_t i, int64_t j) const {
    return parent_[i] == p_.rows + j || parent_[p_.rows + j] == i;
  }

  // The potential of a node in double: u of rows, -v of columns, in the units of `cost`.
  FEWSHOT_EXT_HOST_DEVICE void approximate(int64_t node) {
    approximate_[node] =
        wide_value(potential_ + node * cost_words_, cost_words_).times_power(cost_unit_ + p_.cost_exponent);
  }

  // The reduced cost of an arc that is not forbidden, apart from its level.
  FEWSHOT_EXT_HOST_DEVICE void reduced_cost(int64_t i, int64_t j, Word* to) const {
    const Word *const row = potential_ + i * cost_words_, *const column = potential_ + (p_.rows + j) * cost_words_;
    std::copy(column, column + cost_words_, to);
    wide_subtract(to, row, cost_words_);
    const double c = source_->cost(i, j);
    if (c <= std::numeric_limits<double>::max()) wide_add_double(to, cost_words_, c, cost_unit_);
  }

  FEWSHOT_EXT_HOST_DEVICE int64_t level_of(int64_t i, int64_t j) const {
    return (stored(i, j) > p_.largest) - level_[i] + level_[p_.rows + j];
  }

  // What rounding can make of a reduced cost, relative to the magnitudes that it comes from: potentials are rounded
  // once, and there are two sums. What scaling costs by a power of two cut off is less than `cut_off`.
  FEWSHOT_EXT_HOST_DEVICE double rounding() const { return sums_are_exact_ ? 0 : 0x1p-51; }
  FEWSHOT_EXT_HOST_DEVICE double cut_off() const {
    return p_.cost_exponent == 0 ? 0 : 4 * double(std::numeric_limits<Float>::denorm_min());
  }

  struct Estimate {
    double value, error;
  };
  FEWSHOT_EXT_HOST_DEVICE Estimate estimate(int64_t i, int64_t j) const {
    const double u = approximate_[i], v = approximate_[p_.rows + j];
    const double given = stored(i, j), c = p_.forbids && given > p_.largest ? 0 : given;
    return {(c - u) + v, rounding() * (std::abs(c) + std::abs(u) + std::abs(v)) + cut_off()};
  }

  FEWSHOT_EXT_HOST_DEVICE ExactRow<Float> row(int64_t i) const {
    return {p_.cost + i * p_.stride,
            approximate_ + p_.rows,
            level_ + p_.rows,
            p_.columns,
            p_.stride,
            approximate_[i],
            p_.largest,
            level_[i],
            rounding(),
            cut_off()};
  }

  // The arc of a row that lowers the cost most, of those that are sure to, or -1.
  FEWSHOT_EXT_HOST_DEVICE int64_t best_of_row(int64_t i, Machine& machine) const {
    int64_t best = -1, best_level = 0;
    double lowest = 0;
    for (int64_t j = machine.lane(); j < p_.columns; j += Machine::lanes) {
      const int64_t level = p_.forbids ? level_of(i, j) : 0;
      if (level > best_level) continue;
      const Estimate r = estimate(i, j);
      if (level == best_level && best >= 0 && !(r.value < lowest)) continue;
      if (level == 0 && !(r.value + r.error < 0)) continue;
      best = j;
      best_level = level;
      lowest = r.value;
    }
    const int64_t level = machine.least(best_level);
    bool mine = best >= 0 && best_level == level;
    const double value = machine.least(mine ? lowest : std::numeric_limits<double>::infinity());
    mine &= lowest == value;
    best = machine.least(mine ? best : p_.columns);
    return best < p_.columns ? best : -1;
  }

  template <bool forbids>
  FEWSHOT_EXT_HOST_DEVICE bool find_entering(int64_t& i, int64_t& j, Machine& machine) {
    for (int64_t scanned = 0; scanned < p_.rows;) {
      const int64_t first = next_row_, end = std::min(first + block_rows, p_.rows);
      double lowest = 0;
      i = -1;
      for (int64_t k = first; k < end; ++k) {
        const double of_row = machine.template lowest_of_row<forbids>(row(k));
        if (!(of_row < lowest)) continue;
        lowest = of_row;
        i = k;
      }
      scanned += end - first;
      machine.one([&] { next_row_ = end == p_.rows ? 0 : end; });
      if (machine.stopped()) return false;
      if (i < 0) continue;
      j = best_of_row(i, machine);
      if (j >= 0) return true;
    }
    if (sums_are_exact_) return false;
    // Where the sign is in doubt.
    for (int64_t scanned = 0; scanned < p_.rows; ++scanned) {
      i = next_exact_row_;
      if (machine.stopped()) return false;
      if (find_exactly(i, j, machine)) return true;
      machine.one([&] { next_exact_row_ = i + 1 == p_.rows ? 0 : i + 1; });
    }
    return false;
  }

  FEWSHOT_EXT_HOST_DEVICE bool find_exactly(int64_t i, int64_t& j, Machine& machine) {
    Word* const change = change_ + machine.lane() * cost_words_;
    Scaled lowest{0, 0};
    j = -1;
    for (int64_t column = machine.lane(); column < p_.columns; column += Machine::lanes) {
      if (p_.forbids && level_of(i, column) != 0) continue;
      const Estimate r = estimate(i, column);
      if (r.value > r.error || is_tree_arc(i, column)) continue;
      reduced_cost(i, column, change);
      if (!wide_is_negative(change, cost_words_)) continue;
      const Scaled found = wide_value(change, cost_words_);
      if (j >= 0 && !is_lower(found, lowest)) continue;
      lowest = found;
      j = column;
    }
    machine.agree(lowest, j);
    return j >= 0;
  }

  // The tree.

  FEWSHOT_EXT_HOST_DEVICE void attach(int64_t node, int64_t parent) {
    const int32_t next = first_child_[parent];
    parent_[node] = static_cast<int32_t>(parent);
    last_sibling_[node] = -1;
    next_sibling_[node] = next;
    if (next >= 0) last_sibling_[next] = static_cast<int32_t>(node);
    first_child_[parent] = static_cast<int32_t>(node);
  }

  FEWSHOT_EXT_HOST_DEVICE void detach(int64_t node) {
    const int32_t last = last_sibling_[node], next = next_sibling_[node];
    if (last >= 0)
      next_sibling_[last] = next;
    else
      first_child_[parent_[node]] = next;
    if (next >= 0) last_sibling_[next] = last;
  }

  // The links from `node` up to `last` lead to `node` afterwards, whose own leads to `parent` and carries what moved_
  // holds.
  FEWSHOT_EXT_HOST_DEVICE void turn_links(int64_t node, int64_t last, int64_t parent) {
    for (;;) {
      const int64_t above = parent_[node];
      if (above >= 0) detach(node);
      if (parent >= 0)
        attach(node, parent);
      else
        parent_[node] = -1;
      std::swap_ranges(moved_, moved_ + flow_words_, flow_ + node * flow_words_);
      if (node == last) return;
      parent = node;
      node = above;
    }
  }

  FEWSHOT_EXT_HOST_DEVICE void reroot(int64_t node) {
    turn_links(node, root_, -1);
    root_ = node;
  }

  // Calls visit(node, falls) for the arcs of the cycle that (i, j) closes, and whether their flow falls.
  template <class Visit>
  FEWSHOT_EXT_HOST_DEVICE void each_of_cycle(int64_t i, int64_t j, const Visit& visit) {
    int64_t from = i, to = p_.rows + j;
    while (from != to) {
      int64_t& lower = depth_[from] >= depth_[to] ? from : to;
      // Arcs of the cycle alternate: from the row's end those of rows fall, from the column's those of columns.
      visit(lower, (lower < p_.rows) == (&lower == &from), &lower == &from);
      lower = parent_[lower];
    }
  }

  FEWSHOT_EXT_HOST_DEVICE void pivot(int64_t i, int64_t j) {
    int64_t leaving = -1;
    bool row_moves = false;
    each_of_cycle(i, j, [&](int64_t node, bool falls, bool on_row_side) {
      if (!falls ||
          (leaving >= 0 && !wide_is_less(flow_ + node * flow_words_, flow_ + leaving * flow_words_, flow_words_)))
        return;
      leaving = node;
      row_moves = on_row_side;
    });
    std::copy(flow_ + leaving * flow_words_, flow_ + (leaving + 1) * flow_words_, moved_);
    each_of_cycle(i, j, [&](int64_t node, bool falls, bool) {
      Word* const flow = flow_ + node * flow_words_;
      if (falls)
        wide_subtract(flow, moved_, flow_words_);
      else
        wide_add(flow, moved_, flow_words_);
    });
    reduced_cost(i, j, change_);
    const auto level = static_cast<int32_t>(p_.forbids ? level_of(i, j) : 0);
    const int64_t end = row_moves ? i : p_.rows + j, other = row_moves ? p_.rows + j : i;
    turn_links(end, leaving, other);
    shift_subtree(end, row_moves, level);
  }

  // Potentials of the nodes below `top` rise by change_ and `level`, or fall.
  FEWSHOT_EXT_HOST_DEVICE void shift_subtree(int64_t top, bool rise, int32_t level) {
    int64_t waiting = 0;
    stack_[waiting++] = static_cast<int32_t>(top);
    while (waiting > 0) {
      const int64_t node = stack_[--waiting];
      depth_[node] = depth_[parent_[node]] + 1;
      Word* const potential = potential_ + node * cost_words_;
      if (rise)
        wide_add(potential, change_, cost_words_);
      else
        wide_subtract(potential, change_, cost_words_);
      level_[node] += rise ? level : -level;
      approximate(node);
      for (int32_t child = first_child_[node]; child >= 0; child = next_sibling_[child]) stack_[waiting++] = child;
    }
  }

  // Duals.

  // Where forbidden arcs tie the tree together, their cost becomes a number: one so large that no arc that is allowed
  // has a negative reduced cost.
  FEWSHOT_EXT_HOST_DEVICE void unite_levels() {
    bool any = false;
    for (int64_t k = 0; k < nodes_; ++k) any |= level_[k] != level_[0];
    if (!any) return;
    const int64_t words = cost_words_;
    std::fill(moved_cost(), moved_cost() + words, Word(0));
    for (int64_t i = 0; i < p_.rows; ++i) {
      for (int64_t j = 0; j < p_.columns; ++j) {
        if (level_of(i, j) <= 0 || stored(i, j) > p_.largest) continue;
        const Estimate r = estimate(i, j);
        if (r.value > r.error) continue;
        reduced_cost(i, j, change_);
        wide_add(change_, moved_cost(), words);
        if (wide_is_negative(change_, words)) wide_subtract(moved_cost(), change_, words);
      }
    }
    for (int64_t k = 0; k < nodes_; ++k) {
      const int64_t level = level_[k] - level_[0];
      wide_multiply(change_, moved_cost(), words, Word(std::abs(level)));
      if (level > 0)
        wide_add(potential_ + k * words, change_, words);
      else
        wide_subtract(potential_ + k * words, change_, words);
    }
  }
  FEWSHOT_EXT_HOST_DEVICE Word* moved_cost() { return means_; }  // free until the means are found

  FEWSHOT_EXT_HOST_DEVICE void widen(const Word* x, Word* to) const {
    std::copy(x, x + cost_words_, to);
    std::fill_n(to + cost_words_, 2, wide_is_negative(x, cost_words_) ? ~Word(0) : 0);
  }

  // means_ = 2 rows columns times the potential of a node.
  FEWSHOT_EXT_HOST_DEVICE void start_duals_at(int64_t node) {
    const int64_t words = cost_words_ + 2;
    widen(potential_ + node * cost_words_, means_);
    wide_multiply(sum_, means_, words, Word(2));
    wide_multiply(means_, sum_, words, Word(p_.rows) * Word(p_.columns));
  }

  // means_ = columns * sum of rows' potentials + rows * sum of columns': what all potentials exceed, times
  // 2 rows columns, for u and v of one mean.
  FEWSHOT_EXT_HOST_DEVICE void find_means() {
    const int64_t words = cost_words_ + 2;
    Word *const sum = sum_, *const one = sum_ + words;
    std::fill(means_, means_ + words, Word(0));
    for (const bool of_rows : {true, false}) {
      std::fill(sum, sum + words, Word(0));
      for (int64_t k = of_rows ? 0 : p_.rows; k < (of_rows ? p_.rows : nodes_); ++k) {
        widen(potential_ + k * cost_words_, one);
        wide_add(sum, one, words);
      }
      wide_multiply(one, sum, words, Word(of_rows ? p_.columns : p_.rows));
      wide_add(means_, one, words);
    }
  }

  const Source* source_;
  Problem p_;
  int64_t nodes_, root_, served_, pivots_, next_row_, next_exact_row_;
  int64_t cost_unit_, mass_unit_;  // exponents of what 1 stands for
  int64_t cost_words_, flow_words_, total_words_, perturbation_bits_;
  bool sums_are_exact_, scaled_;
  Scaled divisor_;                                                           // of flows
  int32_t *parent_, *first_child_, *next_sibling_, *last_sibling_, *depth_;  // [nodes]
  int32_t* order_;       // [nodes]: parents first; while it is started, children
  int32_t* stack_;       // [nodes]
  int32_t* level_;       // [rows + stride]
  double* approximate_;  // [rows + stride]
  Word* potential_;      // [nodes][cost_words]
  Word* flow_;           // [nodes][flow_words]: of the perturbed masses
  Word* left_;           // [nodes][flow_words]: masses not yet served; in the end the flows of the plain ones
  Word *supply_total_, *demand_total_;
  Word *change_, *moved_, *means_, *sum_;
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
