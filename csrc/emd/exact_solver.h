// One problem of a batch, on a processor or a GPU: the points that are in it, its exact solution, and its results.
// Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
//
// What brings the costs, and perhaps a first tree, derives from it; ExactSimplex says what a Machine is.
#pragma once

#include "common/half.h"
#include "common/host_device.h"
#include "common/memory.h"
#include "emd/exact_simplex.h"
#include "emd/problem.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

template <class Storage, class Accumulate, class Machine>
class ExactSolver {
 public:
  using Problem = EmdProblem<Storage, Accumulate>;
  using Exact = ExactSimplex<Accumulate, ExactSolver, Machine>;

  // The points that have mass, as they are given.
  FEWSHOT_EXT_HOST_DEVICE double cost(int64_t row, int64_t column) const {
    return cost_of(rows_[row], columns_[column]);
  }
  FEWSHOT_EXT_HOST_DEVICE double supply(int64_t row) const {
    return mass_of(problem_.supply, problem_.supply_strides, rows_[row]);
  }
  FEWSHOT_EXT_HOST_DEVICE double demand(int64_t column) const {
    return mass_of(problem_.demand, problem_.demand_strides, columns_[column]);
  }

 protected:
  // Up to which error of the value, relative to the value, arithmetic in double will do: well below the rounding of
  // results.
  static constexpr double accuracy = sizeof(Accumulate) == 4 ? 0x1p-30 : 0x1p-40;
  // What sides may miss each other by, relative to all mass, where that much would have to use forbidden arcs: as much
  // as sums of rounded masses do.
  static constexpr double mass_rounding = std::is_same_v<Storage, double>  ? 0x1p-46
                                          : std::is_same_v<Storage, float> ? 0x1p-19
                                                                           : emd_mass_tolerance;

  FEWSHOT_EXT_HOST_DEVICE explicit ExactSolver(const Problem& problem)
      : problem_(problem), n_(problem.suppliers), m_(problem.consumers) {}

  FEWSHOT_EXT_HOST_DEVICE void lay_out(ByteArena& arena) {
    mass_ = arena.template take<double>(n_ + m_);
    dual_ = arena.template take<double>(n_ + m_);
    tree_flow_ = arena.template take<double>(n_ + m_);
    parent_ = arena.template take<int32_t>(n_ + m_);
    star_ = arena.template take<int32_t>(n_ + m_);
    rows_ = arena.template take<int32_t>(n_);
    columns_ = arena.template take<int32_t>(m_);
    partner_ = arena.template take<int32_t>(n_ + m_);
  }

  FEWSHOT_EXT_HOST_DEVICE void open(int64_t index) {
    index_ = index;
    basis_ = problem_.basis + index * (n_ + m_ - 1);
  }

  FEWSHOT_EXT_HOST_DEVICE double cost_of(int64_t i, int64_t j) const {
    const int64_t* strides = problem_.cost_strides;
    return to_accumulate(problem_.cost[index_ * strides[0] + i * strides[1] + j * strides[2]]);
  }
  FEWSHOT_EXT_HOST_DEVICE double mass_of(const Storage* from, const int64_t* strides, int64_t k) const {
    return to_accumulate(from[index_ * strides[0] + k * strides[1]]);
  }

  // Masses in double, the demand's rescaled to the supply's, and as the simplex wants them.
  FEWSHOT_EXT_HOST_DEVICE EmdFault load_masses(EmdFailure& failure) {
    const int64_t dummies = problem_.partial;
    double *supply = mass_, *demand = mass_ + n_;
    in_range_ = true;
    if (!load_side(problem_.supply, problem_.supply_strides, n_ - dummies, supply, failure.supply_mass))
      return EmdFault::supply;
    if (!load_side(problem_.demand, problem_.demand_strides, m_ - dummies, demand, failure.demand_mass))
      return EmdFault::demand;
    if (problem_.partial) supply[n_ - 1] = demand[m_ - 1] = 0;
    double total = failure.supply_mass, other = failure.demand_mass;
    if (!(total > 0) || !(other > 0)) return EmdFault::no_mass;
    constexpr double least = 0x1p-900, most = std::numeric_limits<double>::max();
    if (!(total <= most && other <= most && total >= least)) {
      // Sums that are no numbers, or ratios that would lose digits: the first tree takes the masses at another scale,
      // and all results come from them as they are.
      in_range_ = false;
      const double scale = total < least ? 0x1p200 : 0x1p-200;
      total = other = 0;
      for (int64_t k = 0; k < n_ + m_; ++k) {
        if (mass_[k] > 0) mass_[k] = std::max(mass_[k] * scale, std::numeric_limits<double>::denorm_min());
        (k < n_ ? total : other) += mass_[k];
      }
    }
    if (problem_.partial) {
      total_ = std::max(total, other);
      supply_is_more_ = total >= other;
      supply[n_ - 1] = total_ - total;
      demand[m_ - 1] = total_ - other;
    } else {
      if (!(std::abs(total - other) <= emd_mass_tolerance * std::max(total, other))) return EmdFault::unequal_mass;
      total_ = total;
      const double match = total / other;
      for (int64_t j = 0; j < m_; ++j) demand[j] *= match;
    }
    keep_points_with_mass();
    return EmdFault::none;
  }

  FEWSHOT_EXT_HOST_DEVICE bool load_side(const Storage* from, const int64_t* strides, int64_t count, double* to,
                                         double& total) const {
    from += index_ * strides[0];
    bool good = true;
    for (int64_t k = 0; k < count; ++k) {
      const double mass = to_accumulate(from[k * strides[1]]);
      good &= mass >= 0;
      to[k] = mass;
    }
    // By fours, because a long sum rounds more often.
    double parts[4] = {};
    int64_t k = 0;
    for (; k + 4 <= count; k += 4)
      for (int part = 0; part < 4; ++part) parts[part] += to[k + part];
    for (; k < count; ++k) parts[0] += to[k];
    const double sum = total = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    constexpr double most = std::numeric_limits<double>::max();
    return good && (sum <= most || std::all_of(to, to + count, [](double mass) { return mass <= most; }));
  }

  // Whether a point without mass, as which it may come, is part of the problem nevertheless.
  FEWSHOT_EXT_HOST_DEVICE bool is_dummy(int64_t k, int64_t count) const { return problem_.partial && k == count - 1; }

  // The points that are in the problem.
  FEWSHOT_EXT_HOST_DEVICE void keep_points_with_mass() {
    row_count_ = column_count_ = 0;
    for (int64_t i = 0; i < n_; ++i)
      if (mass_[i] > 0 || is_dummy(i, n_)) rows_[row_count_++] = static_cast<int32_t>(i);
    for (int64_t j = 0; j < m_; ++j)
      if (mass_[n_ + j] > 0 || is_dummy(j, m_)) columns_[column_count_++] = static_cast<int32_t>(j);
  }

  // Infinity is the one entry that is no number and yet a cost.
  FEWSHOT_EXT_HOST_DEVICE bool admit_infinity() {
    constexpr Accumulate most = std::numeric_limits<Accumulate>::max();
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j < m_; ++j)
        if (!(cost_of(i, j) >= -double(most))) return false;
    largest_cost_ = 0;
    for (int64_t i = 0; i < row_count_; ++i) {
      for (int64_t j = 0; j < column_count_; ++j) {
        const Accumulate c = cost_[i * stride_ + j];
        if (c > most)
          forbids_ = true;
        else
          largest_cost_ = std::max(largest_cost_, std::abs(c));
      }
    }
    return true;
  }

  // Sums of costs along the tree must not overflow.
  FEWSHOT_EXT_HOST_DEVICE void scale_costs() {
    cost_exponent_ = -20;
    largest_cost_ *= Accumulate(0x1p-20);
    for (int64_t i = 0; i < row_count_; ++i)
      for (int64_t j = 0; j < column_count_; ++j) cost_[i * stride_ + j] *= Accumulate(0x1p-20);
  }

  // Back to the costs as they are.
  FEWSHOT_EXT_HOST_DEVICE double cost_scale() const { return cost_exponent_ == 0 ? 1.0 : 0x1p20; }

  // A cost for the first tree, beyond those of all arcs that are allowed.
  FEWSHOT_EXT_HOST_DEVICE void forbid_arcs() {
    const Accumulate stand_in = largest_cost_ > 0 ? 2 * largest_cost_ : Accumulate(1);
    for (int64_t i = 0; i < row_count_; ++i) {
      Accumulate* const row = cost_ + i * stride_;
      for (int64_t j = 0; j < column_count_; ++j)
        if (row[j] > std::numeric_limits<Accumulate>::max()) row[j] = stand_in;
    }
  }
  FEWSHOT_EXT_HOST_DEVICE bool is_forbidden(int64_t row, int64_t column) const {
    return forbids_ && cost_[row * stride_ + column] > largest_cost_;
  }

  FEWSHOT_EXT_HOST_DEVICE int64_t pivot_limit() const {
    return 100 * (row_count_ + column_count_) + 4 * row_count_ * column_count_;
  }

  FEWSHOT_EXT_HOST_DEVICE int64_t row_at(int64_t node) const { return node < row_count_ ? node : parent_[node]; }
  FEWSHOT_EXT_HOST_DEVICE int64_t column_at(int64_t node) const {
    return (node < row_count_ ? parent_[node] : node) - row_count_;
  }

  // The exact solution of the problem that is loaded, from the tree of the arcs that start() makes exact_ serve, as far
  // as it knows one.
  template <class Start>
  FEWSHOT_EXT_HOST_DEVICE EmdFault solve_exactly(Machine& machine, const Start& start) {
    if (machine.stopped()) return EmdFault::stopped;
    exact_.prepare(*this,
                   {row_count_, column_count_, cost_, stride_, cost_exponent_, largest_cost_, forbids_,
                    problem_.partial ? row_count_ - 1 : -1, problem_.partial ? column_count_ - 1 : -1},
                   machine);
    machine.one([&] {
      start();
      exact_.finish_start();
    });
    if (!exact_.optimize(pivot_limit(), machine)) return machine.stopped() ? EmdFault::stopped : EmdFault::not_optimal;
    machine.one([&] {
      exact_.finish(supply_is_more_);
      keep_solution();
    });
    return is_infeasible_ ? EmdFault::forbidden : EmdFault::none;
  }

  // An arc of the first tree, from the leaves inward.
  FEWSHOT_EXT_HOST_DEVICE void serve_if_open(int64_t row, int64_t column) {
    if (exact_.is_open(row) && exact_.is_open(row_count_ + column)) exact_.serve(row, column);
  }

  FEWSHOT_EXT_HOST_DEVICE void keep_solution() {
    pivots_ += exact_.pivots();
    order_ = exact_.order();
    value_ = exact_.value();
    for (int64_t k = 0; k < row_count_ + column_count_; ++k) {
      const int64_t node = order_[k];
      parent_[node] = static_cast<int32_t>(exact_.parent(node));
      (node < row_count_ ? dual_[rows_[node]] : dual_[n_ + columns_[node - row_count_]]) = exact_.dual(node);
      if (k == 0) continue;
      basis_[k - 1] = cell_of(node);
      tree_flow_[k] = exact_.flow(node);
    }
    is_infeasible_ = forbids_ && !free_forbidden_arcs();
  }

  FEWSHOT_EXT_HOST_DEVICE bool is_forbidden_arc(int64_t node) const {
    return is_forbidden(row_at(node), column_at(node));
  }

  // Takes the flows from forbidden arcs; false where one is more than a rounding of the masses that the arc parts,
  // which are those that the other arcs of the tree tie to either end.
  FEWSHOT_EXT_HOST_DEVICE bool free_forbidden_arcs() {
    const int64_t nodes = row_count_ + column_count_;
    double* const tied = mass_;  // to a node, of those below it
    int32_t* const top = star_;  // the highest node that one is tied to
    for (int64_t k = 0; k < nodes; ++k) tied[k] = k < row_count_ ? supply(k) : demand(k - row_count_);
    for (int64_t k = nodes - 1; k > 0; --k)
      if (!is_forbidden_arc(order_[k])) tied[parent_[order_[k]]] += tied[order_[k]];
    top[order_[0]] = order_[0];
    for (int64_t k = 1; k < nodes; ++k) {
      const int32_t node = order_[k];
      top[node] = is_forbidden_arc(node) ? node : top[parent_[node]];
    }
    for (int64_t k = 1; k < nodes; ++k) {
      const int32_t node = order_[k];
      if (!is_forbidden_arc(node)) continue;
      if (tree_flow_[k] > mass_rounding * std::min(tied[node], tied[top[parent_[node]]])) return false;
      tree_flow_[k] = 0;
    }
    return true;
  }

  // Duals of nodes without mass: those of the arcs that are cheapest at the duals of the others. These arcs are kept,
  // for consumers in partner_ and likewise for suppliers.
  FEWSHOT_EXT_HOST_DEVICE void attach_nodes_without_mass() {
    constexpr double most = std::numeric_limits<Accumulate>::max();
    double *u = dual_, *v = dual_ + n_;
    for_each_missing(rows_, row_count_, n_, [&](int64_t i) {
      u[i] = most;
      partner_[i] = columns_[0];
      for (int64_t k = 0; k < column_count_; ++k) {
        const int64_t j = columns_[k];
        const double slack = cost_of(i, j) - v[j];
        if (!(slack < u[i])) continue;
        u[i] = std::max(slack, -most);
        partner_[i] = static_cast<int32_t>(j);
      }
    });
    for_each_missing(columns_, column_count_, m_, [&](int64_t j) {
      v[j] = most;
      partner_[n_ + j] = rows_[0];
      for (int64_t i = 0; i < n_; ++i) {
        const double slack = cost_of(i, j) - u[i];
        if (!(slack < v[j])) continue;
        v[j] = std::max(slack, -most);
        partner_[n_ + j] = static_cast<int32_t>(i);
      }
    });
  }

  template <class Visit>
  FEWSHOT_EXT_HOST_DEVICE static void for_each_missing(const int32_t* present, int64_t present_count, int64_t count,
                                                       const Visit& visit) {
    for (int64_t k = 0, at = 0; k < count; ++k) {
      if (at < present_count && present[at] == k)
        ++at;
      else
        visit(k);
    }
  }

  // Results of one problem; false if one is beyond the range of its type.
  FEWSHOT_EXT_HOST_DEVICE bool write() {
    Accumulate* flow = problem_.flow + index_ * n_ * m_;
    std::fill(flow, flow + n_ * m_, Accumulate(0));
    for (int64_t k = row_count_ + column_count_ - 1; k > 0; --k)
      flow[basis_[k - 1]] = static_cast<Accumulate>(tree_flow_[k]);
    if (row_count_ < n_ || column_count_ < m_) {
      attach_nodes_without_mass();
      complete_basis();
    }
    const auto value = static_cast<Accumulate>(value_);
    problem_.value[index_] = value;
    problem_.pivots[index_] = static_cast<int32_t>(pivots_);
    constexpr Accumulate most = std::numeric_limits<Accumulate>::max();
    bool in_range = std::abs(value) <= most;
    Accumulate *to_u = problem_.supply_dual + index_ * n_, *to_v = problem_.demand_dual + index_ * m_;
    for (int64_t i = 0; i < n_; ++i) {
      to_u[i] = static_cast<Accumulate>(dual_[i]);
      in_range &= std::abs(to_u[i]) <= most;
    }
    for (int64_t j = 0; j < m_; ++j) {
      to_v[j] = static_cast<Accumulate>(dual_[n_ + j]);
      in_range &= std::abs(to_v[j]) <= most;
    }
    return in_range;
  }

  FEWSHOT_EXT_HOST_DEVICE int32_t cell_of(int64_t node) const {
    return static_cast<int32_t>(rows_[row_at(node)] * m_ + columns_[column_at(node)]);
  }

  // The arcs of points without mass come last, but for that of supplier 0, with which every basis begins: where it has
  // no mass, the tree grows from its partner.
  FEWSHOT_EXT_HOST_DEVICE void complete_basis() {
    int32_t* to = basis_ + (row_count_ + column_count_ - 1);
    const auto without_mass = [&](int64_t i, int64_t j) { *to++ = static_cast<int32_t>(-1 - (i * m_ + j)); };
    if (rows_[0] != 0) {
      to = basis_;
      without_mass(0, partner_[0]);
      constexpr int32_t written = -1;
      int64_t node = row_count_ + (std::find(columns_, columns_ + column_count_, partner_[0]) - columns_);
      while (node != order_[0]) {
        *to++ = cell_of(node);
        node = std::exchange(parent_[node], written);
      }
      for (int64_t k = 1; k < row_count_ + column_count_; ++k)
        if (parent_[order_[k]] != written) *to++ = cell_of(order_[k]);
    }
    for_each_missing(rows_, row_count_, n_, [&](int64_t i) {
      if (i > 0) without_mass(i, partner_[i]);
    });
    for_each_missing(columns_, column_count_, m_, [&](int64_t j) { without_mass(partner_[n_ + j], j); });
  }

  const Problem& problem_;
  const int64_t n_, m_;
  Exact exact_;
  int64_t index_;
  // [row_count_][stride_]: 2^cost_exponent_ times those between points that have mass, and a stand-in for infinity
  Accumulate* cost_;
  double* mass_;      // [n + m]: supply, demand
  double* dual_;      // [n + m]: u, v
  int32_t* rows_;     // [row_count_]: suppliers that have mass
  int32_t* columns_;  // [column_count_]: consumers that have mass
  int32_t* partner_;  // [n + m]: of nodes without mass, the other end of their arc
  int64_t row_count_, column_count_, stride_;
  int cost_exponent_;
  double total_, value_;
  Accumulate largest_cost_;  // in cost_, of the arcs that are not forbidden
  bool in_range_, forbids_, supply_is_more_ = false, is_infeasible_ = false;
  // The tree, of nodes that have mass, rows first: parents before children, row 0 first; and the flow on the arc of a
  // node to its parent, by the node's place in this order.
  const int32_t* order_;
  int32_t *parent_, *star_;
  double* tree_flow_;
  int32_t* basis_;  // of the problem, among the results
  int64_t pivots_;
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
