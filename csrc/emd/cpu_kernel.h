// Batches of transportation problems on the CPU. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
#pragma once

#include "common/cancellation.h"
#include "common/denormals.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "emd/exact_simplex.h"
#include "emd/problem.h"
#include "emd/simplex.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// One thread's solver: memory for one problem, used again for the next.
template <class Storage, class Accumulate>
class EmdSolver {
  using Problem = EmdProblem<Storage, Accumulate>;
  using Simplex = TransportSimplex<Accumulate>;
  using Exact = ExactSimplex<Accumulate, EmdSolver>;
  // Beyond, the sets of TransportSimplex would take more memory than most costs do.
  static constexpr int64_t most_bytes_of_sets = int64_t(32) << 20;
  // Up to which error of the value, relative to the value, arithmetic in double will do: well below the rounding of
  // results.
  static constexpr double accuracy = sizeof(Accumulate) == 4 ? 0x1p-30 : 0x1p-40;
  // What sides may miss each other by, relative to all mass, where that much would have to use forbidden arcs: as much
  // as sums of rounded masses do.
  static constexpr double mass_rounding = std::is_same_v<Storage, double>  ? 0x1p-46
                                          : std::is_same_v<Storage, float> ? 0x1p-19
                                                                           : emd_mass_tolerance;

 public:
  EmdSolver(const Problem& problem, Cancellation& cancellation)
      : problem_(problem),
        cancellation_(cancellation),
        n_(problem.suppliers),
        m_(problem.consumers),
        has_sets_(std::min(n_, m_) > 1 && Simplex::bytes_of_sets(n_ + m_) <= most_bytes_of_sets) {
    ByteArena sizes{};
    lay_out(sizes);
    workspace_.emplace(static_cast<size_t>(sizes.bytes.used));
    ByteArena arena{{static_cast<unsigned char*>(workspace_->data())}};
    lay_out(arena);
    simplex_.cost = cost_;
  }

  EmdFailure solve(int64_t index) {
    EmdFailure failure;
    failure.index = index_ = index;
    basis_ = problem_.basis + index * (n_ + m_ - 1);
    failure.fault = load_masses(failure);
    if (failure.fault == EmdFault::none) failure.fault = load_cost();
    if (failure.fault == EmdFault::none && !solve_in_double()) failure.fault = solve_exactly();
    if (failure.fault == EmdFault::none && !write()) failure.fault = EmdFault::overflow;
    return failure;
  }

  // The points that have mass, as they are given.
  double cost(int64_t row, int64_t column) const { return cost_of(rows_[row], columns_[column]); }
  double supply(int64_t row) const { return mass_of(problem_.supply, problem_.supply_strides, rows_[row]); }
  double demand(int64_t column) const { return mass_of(problem_.demand, problem_.demand_strides, columns_[column]); }

 private:
  void lay_out(ByteArena& arena) {
    cost_ = arena.template take<Accumulate>(n_ * Simplex::cost_stride(m_));
    if (has_sets_) simplex_.lay_out(arena, n_, m_);
    start_.lay_out(arena, n_, Simplex::cost_stride(m_));
    mass_ = arena.template take<double>(n_ + m_);
    dual_ = arena.template take<double>(n_ + m_);
    tree_flow_ = arena.template take<double>(n_ + m_);
    parent_ = arena.template take<int32_t>(n_ + m_);
    star_ = arena.template take<int32_t>(n_ + m_);
    rows_ = arena.template take<int32_t>(n_);
    columns_ = arena.template take<int32_t>(m_);
    partner_ = arena.template take<int32_t>(n_ + m_);
    line_ = arena.template take<Accumulate>(Simplex::cost_stride(m_));
  }

  double cost_of(int64_t i, int64_t j) const {
    const int64_t* strides = problem_.cost_strides;
    return to_accumulate(problem_.cost[index_ * strides[0] + i * strides[1] + j * strides[2]]);
  }
  double mass_of(const Storage* from, const int64_t* strides, int64_t k) const {
    return to_accumulate(from[index_ * strides[0] + k * strides[1]]);
  }

  // Masses in double, the demand's rescaled to the supply's, and as the simplex wants them.
  EmdFault load_masses(EmdFailure& failure) {
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

  bool load_side(const Storage* from, const int64_t* strides, int64_t count, double* to, double& total) const {
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
  bool is_dummy(int64_t k, int64_t count) const { return problem_.partial && k == count - 1; }

  // The points that are in the problem, and their masses as integers for the simplex, with its perturbation.
  void keep_points_with_mass() {
    const int row_bits = 64 - __builtin_clzll(static_cast<uint64_t>(n_));  // 2^row_bits > n
    mass_bits_ = 61 - row_bits;
    const double scale = std::ldexp(1.0, mass_bits_);
    int64_t difference = 0, largest = 0;
    row_count_ = column_count_ = 0;
    for (int64_t i = 0; i < n_; ++i) {
      if (!(mass_[i] > 0) && !is_dummy(i, n_)) continue;
      rows_[row_count_] = static_cast<int32_t>(i);
      if (has_sets_) {
        const int64_t units = is_dummy(i, n_) ? 0 : static_cast<int64_t>(mass_[i] / total_ * scale + 0.5);
        difference += units;
        simplex_.supply[row_count_] = (units << row_bits) + 1;
      }
      ++row_count_;
    }
    for (int64_t j = 0; j < m_; ++j) {
      if (!(mass_[n_ + j] > 0) && !is_dummy(j, m_)) continue;
      columns_[column_count_] = static_cast<int32_t>(j);
      if (has_sets_) {
        // Rows, unlike columns, may have no mass but the perturbation's.
        const int64_t units =
            is_dummy(j, m_) ? 0 : std::max<int64_t>(1, static_cast<int64_t>(mass_[n_ + j] / total_ * scale + 0.5));
        difference -= units;
        simplex_.demand[column_count_] = units << row_bits;
        if (simplex_.demand[column_count_] > simplex_.demand[largest]) largest = column_count_;
      }
      ++column_count_;
    }
    if (!has_sets_) return;
    if (problem_.partial) {
      largest = column_count_ - 1;
      if (difference < 0) {
        simplex_.supply[row_count_ - 1] -= difference << row_bits;
        difference = 0;
      }
    }
    simplex_.demand[largest] += (difference << row_bits) + row_count_;
  }

  // Costs of the points that have mass, in the arithmetic of the simplex.
  EmdFault load_cost() {
    const Storage* from = problem_.cost + index_ * problem_.cost_strides[0];
    const int64_t step = problem_.cost_strides[2];
    stride_ = Simplex::cost_stride(column_count_);
    const bool all_columns = column_count_ == m_;
    Vector<Accumulate> largest{}, zero{};
    int64_t kept = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const Storage* row = from + i * problem_.cost_strides[1];
      // A row without mass is looked at, too: an entry that is no cost is a fault wherever it is.
      const bool keep = kept < row_count_ && rows_[kept] == i;
      Accumulate* to = cost_ + kept * stride_;
      const bool whole = keep && all_columns;
      Accumulate* line = whole ? to : line_;
      if (step == 1)
        for (int64_t j = 0; j < m_; ++j) line[j] = to_accumulate(row[j]);
      else
        for (int64_t j = 0; j < m_; ++j) line[j] = to_accumulate(row[j * step]);
      const int64_t padded = Simplex::cost_stride(m_);
      std::fill(line + m_, line + padded, Accumulate(0));
      Vector<Accumulate> largest_of_row{};
      for (int64_t j = 0; j < padded; j += Simplex::cost_lanes) {
        const Vector<Accumulate> v = load(line + j);
        zero += v - v;  // NaN for infinity and NaN
        largest_of_row = larger<Accumulate>(v < 0 ? -v : v, largest_of_row);
      }
      if (whole) largest = larger<Accumulate>(largest_of_row, largest);
      if (!keep) continue;
      if (!all_columns) {
        for (int64_t j = 0; j < column_count_; ++j) to[j] = line[columns_[j]];
        std::fill(to + column_count_, to + stride_, Accumulate(0));
        for (int64_t j = 0; j < stride_; j += Simplex::cost_lanes) {
          const Vector<Accumulate> v = load(to + j);
          largest = larger<Accumulate>(v < 0 ? -v : v, largest);
        }
      }
      std::fill(to + column_count_, to + stride_, Simplex::no_arc);
      ++kept;
    }
    largest_cost_ = -horizontal_min<Accumulate>(-largest);
    forbids_ = false;
    if (!(horizontal_sum<Accumulate>(zero) == 0) && !admit_infinity()) return EmdFault::cost;
    cost_exponent_ = 0;
    if (largest_cost_ > Simplex::largest_cost) scale_costs();
    if (forbids_) forbid_arcs();
    return EmdFault::none;
  }

  // Infinity is the one entry that is no number and yet a cost.
  bool admit_infinity() {
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
  void scale_costs() {
    cost_exponent_ = -20;
    largest_cost_ *= Accumulate(0x1p-20);
    for (int64_t i = 0; i < row_count_; ++i)
      for (int64_t j = 0; j < column_count_; ++j) cost_[i * stride_ + j] *= Accumulate(0x1p-20);
  }

  double cost_scale() const { return cost_exponent_ == 0 ? 1.0 : 0x1p20; }  // back to the costs as they are

  // A cost for the first tree, beyond those of all arcs that are allowed.
  void forbid_arcs() {
    const Accumulate stand_in = largest_cost_ > 0 ? 2 * largest_cost_ : Accumulate(1);
    for (int64_t i = 0; i < row_count_; ++i) {
      Accumulate* const row = cost_ + i * stride_;
      for (int64_t j = 0; j < column_count_; ++j)
        if (row[j] > std::numeric_limits<Accumulate>::max()) row[j] = stand_in;
    }
  }
  bool is_forbidden(int64_t row, int64_t column) const {
    return forbids_ && cost_[row * stride_ + column] > largest_cost_;
  }

  // The optimal tree up to the rounding of double, with its flows and duals. False where that may be too much, or there
  // is no tree.
  bool solve_in_double() {
    order_ = nullptr;
    if (row_count_ == 1 || column_count_ == 1)
      grow_star();
    else if (!has_sets_ || !grow_tree())
      return false;
    return in_range_ && ship();
  }

  // The only tree where a side has one point.
  void grow_star() {
    const int64_t nodes = row_count_ + column_count_, center = row_count_ == 1 ? 0 : row_count_;
    pivots_ = 0;
    for (int64_t k = 0; k < nodes; ++k) {
      star_[k] = static_cast<int32_t>(k == 0 ? 0 : k == 1 ? row_count_ : row_count_ == 1 ? k : k - 1);
      parent_[k] = static_cast<int32_t>(center);
    }
    parent_[row_count_] = 0;
    order_ = star_;
    const double first = cost(0, 0);
    dual_[0] = 0;
    for (int64_t j = 0; j < column_count_; ++j) dual_[n_ + columns_[j]] = cost(0, j);
    for (int64_t i = 0; i < row_count_; ++i) dual_[rows_[i]] = row_count_ == 1 ? 0 : cost(i, 0) - first;
    tolerance_ = 0;
  }

  // False where there was no time to finish.
  bool grow_tree() {
    const int64_t nodes = row_count_ + column_count_;
    const double largest = forbids_ ? 2.0 * double(largest_cost_) : double(largest_cost_);
    // Rounding of potentials, which are sums of costs along the tree, stays below this.
    const double tolerance = double(nodes) * 0x1p-50 * largest;
    const int64_t limit = pivot_limit();
    if (!simplex_.begin(row_count_, column_count_, tolerance, start_, cancellation_)) return false;
    bool optimal = simplex_.template optimise<Accumulate>(limit, cancellation_);
    // Proved in double, with potentials that carry no rounding from pivots.
    for (int64_t pivots = -1; pivots != simplex_.pivots();) {
      pivots = simplex_.pivots();
      order_ = simplex_.renew_potentials();
      if (optimal) optimal = simplex_.template optimise<double>(limit, cancellation_);
    }
    for (int64_t k = 0; k < nodes; ++k) parent_[k] = simplex_.link_of(k).parent;
    pivots_ = simplex_.pivots();
    const double* potential = simplex_.potentials();
    const double scale = cost_scale();
    for (int64_t i = 0; i < row_count_; ++i) dual_[rows_[i]] = potential[i] * scale;
    for (int64_t j = 0; j < column_count_; ++j) dual_[n_ + columns_[j]] = -potential[row_count_ + j] * scale;
    tolerance_ = simplex_.tolerance() * scale;
    return optimal;
  }
  int64_t pivot_limit() const { return 100 * (row_count_ + column_count_) + 4 * row_count_ * column_count_; }

  int64_t row_at(int64_t node) const { return node < row_count_ ? node : parent_[node]; }
  int64_t column_at(int64_t node) const { return (node < row_count_ ? parent_[node] : node) - row_count_; }

  // Flows, from the leaves inward: what a node has left passes through its arc to the root. And the value; false where
  // rounding may have had a part in it that counts.
  bool ship() {
    double value = 0, magnitude = 0, deficit = 0, changed = 0;
    const double scale = cost_scale();
    bool allowed = true;
    for (int64_t k = row_count_ + column_count_ - 1; k > 0; --k) {
      const int64_t node = order_[k], row = row_at(node), column = column_at(node);
      const int64_t i = rows_[row], j = columns_[column];
      double &from = node < row_count_ ? mass_[i] : mass_[n_ + j], &to = node < row_count_ ? mass_[n_ + j] : mass_[i];
      const double moved = std::max(from, 0.0);
      deficit += moved - from;
      to -= from;
      changed += std::abs(to);
      tree_flow_[k] = moved;
      basis_[k - 1] = static_cast<int32_t>(i * m_ + j);
      const Accumulate c = cost_[row * stride_ + column];
      allowed &= !(moved > 0 && c > largest_cost_);
      const double part = moved * (double(c) * scale);
      value += part;
      magnitude += std::abs(part);
    }
    value_ = value;
    // What rounding has done to flows, and what was left out below 0, amounts to other masses, by this much in all. A
    // unit of them changes the optimum by two arcs' costs at most. An arc of negative reduced cost could not carry more
    // than all mass, and a sum of k numbers that are not negative is off by k 2^-53 of itself.
    const double count = double(row_count_ + column_count_), unit = 0x1p-53;
    const double masses = (changed + (sum_roundings() + 3) * total_) * unit + deficit;
    const double two_arcs = (forbids_ ? 4 : 2) * double(largest_cost_) * scale;
    const double error = masses * two_arcs + tolerance_ * total_ + count * unit * magnitude;
    const double acceptable = accuracy * std::abs(value);
    if (!(allowed && error <= acceptable && acceptable <= std::numeric_limits<double>::max())) return false;
    center_duals();
    return true;
  }
  // Of the sums of the masses.
  double sum_roundings() const { return 0.25 * double(n_ + m_) + 6; }

  // The same mean for both, or none for the dummy that takes what is not moved.
  void center_duals() {
    // Shares of the means, for sums could overflow.
    const double share_u = 0.5 / double(row_count_), share_v = 0.5 / double(column_count_);
    double shift = 0;
    for (int64_t i = 0; i < row_count_; ++i) shift -= dual_[rows_[i]] * share_u;
    for (int64_t j = 0; j < column_count_; ++j) shift += dual_[n_ + columns_[j]] * share_v;
    if (problem_.partial) shift = supply_is_more_ ? dual_[n_ + m_ - 1] : -dual_[n_ - 1];
    for (int64_t i = 0; i < row_count_; ++i) dual_[rows_[i]] += shift;
    for (int64_t j = 0; j < column_count_; ++j) dual_[n_ + columns_[j]] -= shift;
  }

  // The same without rounding, from the tree that there is.
  __attribute__((noinline, cold)) EmdFault solve_exactly() {
    if (cancellation_.requested()) return EmdFault::stopped;
    exact_.prepare(*this, {row_count_, column_count_, cost_, stride_, cost_exponent_, largest_cost_, forbids_,
                           problem_.partial ? row_count_ - 1 : -1, problem_.partial ? column_count_ - 1 : -1});
    if (order_) {
      for (int64_t k = row_count_ + column_count_ - 1; k > 0; --k) {
        const int64_t node = order_[k];
        if (exact_.is_open(node) && exact_.is_open(parent_[node])) exact_.serve(row_at(node), column_at(node));
      }
    } else {
      pivots_ = 0;
      const auto serve = [&](int64_t i, int64_t j) { return exact_.serve(i, j); };
      if (!start_.run(cost_, stride_, row_count_, column_count_, cancellation_, serve)) return EmdFault::stopped;
    }
    exact_.finish_start();
    if (!exact_.optimise(pivot_limit(), cancellation_))
      return cancellation_.requested() ? EmdFault::stopped : EmdFault::not_optimal;
    exact_.finish(supply_is_more_);
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
    return !forbids_ || free_forbidden_arcs() ? EmdFault::none : EmdFault::forbidden;
  }

  bool is_forbidden_arc(int64_t node) const { return is_forbidden(row_at(node), column_at(node)); }

  // Takes the flows from forbidden arcs; false where one is more than a rounding of the masses that the arc parts,
  // which are those that the other arcs of the tree tie to either end.
  bool free_forbidden_arcs() {
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
  void attach_nodes_without_mass() {
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
  static void for_each_missing(const int32_t* present, int64_t present_count, int64_t count, const Visit& visit) {
    for (int64_t k = 0, at = 0; k < count; ++k) {
      if (at < present_count && present[at] == k)
        ++at;
      else
        visit(k);
    }
  }

  // Results of one problem; false if one is beyond the range of its type.
  bool write() {
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

  int32_t cell_of(int64_t node) const {
    return static_cast<int32_t>(rows_[row_at(node)] * m_ + columns_[column_at(node)]);
  }

  // The arcs of points without mass come last, but for that of supplier 0, with which every basis begins: where it has
  // no mass, the tree grows from its partner.
  void complete_basis() {
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
  Cancellation& cancellation_;
  const int64_t n_, m_;
  const bool has_sets_;  // for a first tree by TransportSimplex
  std::optional<Workspace> workspace_;
  Simplex simplex_;
  Exact exact_;
  RegretStart<Accumulate> start_;
  int64_t index_;
  Accumulate* cost_;  // [row_count_][stride_]: 2^cost_exponent_ times those between points that have mass
  double* mass_;      // [n + m]: supply, demand
  double* dual_;      // [n + m]: u, v
  int32_t* rows_;     // [row_count_]: suppliers that have mass
  int32_t* columns_;  // [column_count_]: consumers that have mass
  int32_t* partner_;  // [n + m]: of nodes without mass, the other end of their arc
  Accumulate* line_;  // [stride]: a row of costs with all its columns
  int64_t row_count_, column_count_, stride_;
  int mass_bits_, cost_exponent_;
  double total_, value_, tolerance_;
  Accumulate largest_cost_;  // in cost_, of the arcs that are not forbidden
  bool in_range_, forbids_, supply_is_more_ = false;
  // The tree, of nodes that have mass, rows first: parents before children, row 0 first; and the flow on the arc of a
  // node to its parent, by the node's place in this order.
  const int32_t* order_;
  int32_t *parent_, *star_;
  double* tree_flow_;
  int32_t* basis_;  // of the problem, among the results
  int64_t pivots_;
};

// Work that is worth a thread of its own, in entries of cost matrices.
constexpr int64_t entries_per_thread = 4096;
// Entries of one problem from which on other threads may be left with seconds of work.
constexpr int64_t long_problem = 1 << 18;

template <class Storage, class Accumulate>
EmdFailure emd(const EmdProblem<Storage, Accumulate>& problem) {
  const int64_t batch = problem.batch, cells = problem.suppliers * problem.consumers, entries = batch * cells;
  const int64_t threads = std::min({available_threads(), batch, entries / entries_per_thread + 1});
  const int64_t chunk = std::clamp<int64_t>(batch / (threads * 16), 1, long_problem / cells + 1);
  // Problems differ in pivots: threads take the next chunk when they are done with one. All problems before a failed
  // one are still solved, so that the failure that is reported does not depend on the threads.
  std::atomic<int64_t> next{0}, first_failed{batch}, at_work{0};
  std::vector<EmdFailure> failures(threads);
  Cancellation cancellation;
  const auto work = [&](EmdFailure& failed) {
    EmdSolver<Storage, Accumulate> solver(problem, cancellation);
    for (;;) {
      const int64_t begin = next.fetch_add(chunk), end = std::min(batch, begin + chunk);
      for (int64_t index = begin; index < end; ++index) {
        if (index > first_failed.load(std::memory_order_relaxed)) return;
        EmdFailure failure = solver.solve(index);
        if (cancellation.requested()) failure = {EmdFault::stopped, 0};
        if (failure.fault == EmdFault::none) continue;
        failed = failure;
        int64_t known = first_failed.load(std::memory_order_relaxed);
        while (failure.index < known &&
               !first_failed.compare_exchange_weak(known, failure.index, std::memory_order_relaxed)) {
        }
        return;
      }
      if (end >= batch) return;
    }
  };
  parallel_tasks(threads, [&](int64_t thread) {
    const DenormalNumbers ieee;
    at_work.fetch_add(1);
    work(failures[thread]);
    at_work.fetch_sub(1);
    // The others might go on for long while nobody looks for signals.
    if (cells >= long_problem && cancellation.is_caller()) {
      while (at_work.load() > 0 && !cancellation.requested()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  for (const EmdFailure& failure : failures)
    if (failure.fault == EmdFault::stopped) return failure;
  for (const EmdFailure& failure : failures)
    if (failure.fault != EmdFault::none && failure.index == first_failed) return failure;
  return {};
}

template EmdFailure emd(const EmdProblem<float, float>&);
template EmdFailure emd(const EmdProblem<double, double>&);
template EmdFailure emd(const EmdProblem<BFloat16, float>&);
template EmdFailure emd(const EmdProblem<Float16, float>&);

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
