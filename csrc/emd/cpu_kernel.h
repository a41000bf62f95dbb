// Batches of transportation problems on the CPU. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
#pragma once

#include "common/memory.h"
#include "common/parallel.h"
#include "emd/problem.h"
#include "emd/simplex.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// One thread's solver: memory for one problem, used again for the next.
template <class Storage, class Accumulate>
class EmdSolver {
  using Problem = EmdProblem<Storage, Accumulate>;
  using Simplex = TransportSimplex<Accumulate>;

 public:
  explicit EmdSolver(const Problem& problem) : problem_(problem), n_(problem.suppliers), m_(problem.consumers) {
    ByteArena sizes{};
    lay_out(sizes);
    workspace_.emplace(static_cast<size_t>(sizes.bytes.used));
    ByteArena arena{{static_cast<unsigned char*>(workspace_->data())}};
    lay_out(arena);
  }

  EmdFailure solve(int64_t index) {
    EmdFailure failure;
    failure.index = index;
    failure.fault = load_masses(index, failure);
    if (failure.fault == EmdFault::none) failure.fault = load_cost(index);
    if (failure.fault == EmdFault::none && !(find_basis() && write(index))) failure.fault = EmdFault::not_optimal;
    return failure;
  }

 private:
  void lay_out(ByteArena& arena) {
    simplex_.lay_out(arena, n_, m_);
    mass_ = arena.template take<double>(n_ + m_);
    dual_ = arena.template take<double>(n_ + m_);
    rows_ = arena.template take<int32_t>(n_);
    columns_ = arena.template take<int32_t>(m_);
    partner_ = arena.template take<int32_t>(n_ + m_);
    line_ = arena.template take<Accumulate>(Simplex::cost_stride(m_));
  }

  // Masses in double, the demand's rescaled to the supply's, and as the simplex wants them.
  EmdFault load_masses(int64_t index, EmdFailure& failure) {
    double* supply = mass_;
    double* demand = mass_ + n_;
    if (!load_side(problem_.supply, problem_.supply_strides, index, n_, supply, failure.supply_mass))
      return EmdFault::supply;
    if (!load_side(problem_.demand, problem_.demand_strides, index, m_, demand, failure.demand_mass))
      return EmdFault::demand;
    const double total = failure.supply_mass, other = failure.demand_mass;
    if (!(total > 0) || !(other > 0)) return EmdFault::no_mass;
    if (!(std::abs(total - other) <= emd_mass_tolerance * std::max(total, other))) return EmdFault::unequal_mass;
    total_ = total;
    const double match = total / other;
    for (int64_t j = 0; j < m_; ++j) demand[j] *= match;
    scale_masses();
    return EmdFault::none;
  }

  static bool load_side(const Storage* from, const int64_t* strides, int64_t index, int64_t count, double* to,
                        double& total) {
    from += index * strides[0];
    double sum = 0;
    bool good = true;
    for (int64_t k = 0; k < count; ++k) {
      const double mass = to_accumulate(from[k * strides[1]]);
      good &= mass >= 0;
      sum += mass;
      to[k] = mass;
    }
    total = sum;
    return good && sum <= std::numeric_limits<double>::max();
  }

  // The masses as integers for the simplex, with its perturbation; nodes without mass stay out of it.
  void scale_masses() {
    const int row_bits = 64 - __builtin_clzll(static_cast<uint64_t>(n_));  // 2^row_bits > n
    mass_bits_ = 61 - row_bits;
    const double scale = std::ldexp(1.0, mass_bits_);
    int64_t difference = 0, largest = 0;
    row_count_ = column_count_ = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t mass = static_cast<int64_t>(mass_[i] / total_ * scale + 0.5);
      // Row 0 stays, for the tree begins with it; rows, unlike columns, may have no mass but the perturbation's.
      if (mass == 0 && i > 0) continue;
      difference += mass;
      rows_[row_count_] = static_cast<int32_t>(i);
      simplex_.supply[row_count_++] = (mass << row_bits) + 1;
    }
    for (int64_t j = 0; j < m_; ++j) {
      const int64_t mass = static_cast<int64_t>(mass_[n_ + j] / total_ * scale + 0.5);
      if (mass == 0) continue;
      difference -= mass;
      columns_[column_count_] = static_cast<int32_t>(j);
      simplex_.demand[column_count_] = mass << row_bits;
      if (simplex_.demand[column_count_] > simplex_.demand[largest]) largest = column_count_;
      ++column_count_;
    }
    simplex_.demand[largest] += (difference << row_bits) + row_count_;
  }

  // Costs of the nodes that have mass, in the arithmetic of the simplex.
  EmdFault load_cost(int64_t index) {
    const Storage* from = problem_.cost + index * problem_.cost_strides[0];
    const bool all_columns = column_count_ == m_;
    const int64_t stride = Simplex::cost_stride(column_count_);
    const int64_t step = problem_.cost_strides[2];
    Vector<Accumulate> largest{}, zero{};
    int64_t kept = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const Storage* row = from + i * problem_.cost_strides[1];
      // A row without mass is looked at, too: an entry that is not finite is a fault wherever it is.
      const bool keep = kept < row_count_ && rows_[kept] == i;
      Accumulate* to = simplex_.cost + kept * stride;
      Accumulate* line = keep && all_columns ? to : line_;
      if (step == 1)
        for (int64_t j = 0; j < m_; ++j) line[j] = to_accumulate(row[j]);
      else
        for (int64_t j = 0; j < m_; ++j) line[j] = to_accumulate(row[j * step]);
      std::fill(line + m_, line + Simplex::cost_stride(m_), Accumulate(0));
      for (int64_t j = 0; j < m_; j += Simplex::cost_lanes) {
        const Vector<Accumulate> v = load(line + j);
        zero += v - v;  // NaN for infinity and NaN
        largest = larger<Accumulate>(v < 0 ? -v : v, largest);
      }
      if (!keep) continue;
      if (!all_columns)
        for (int64_t j = 0; j < column_count_; ++j) to[j] = line[columns_[j]];
      std::fill(to + column_count_, to + stride, Simplex::no_arc);
      ++kept;
    }
    if (!(horizontal_sum<Accumulate>(zero) == 0)) return EmdFault::cost;
    largest_cost_ = -horizontal_min<Accumulate>(-largest);
    cost_scale_ = 1;
    if (largest_cost_ > Simplex::largest_cost) scale_costs(stride);
    return EmdFault::none;
  }

  // Sums of costs along the tree must not overflow.
  void scale_costs(int64_t stride) {
    cost_scale_ = Accumulate(0x1p-20);
    largest_cost_ *= cost_scale_;
    for (int64_t i = 0; i < row_count_; ++i)
      for (int64_t j = 0; j < column_count_; ++j) simplex_.cost[i * stride + j] *= cost_scale_;
  }

  double cost_of(int64_t index, int64_t i, int64_t j) const {
    const int64_t* strides = problem_.cost_strides;
    return to_accumulate(problem_.cost[index * strides[0] + i * strides[1] + j * strides[2]]);
  }

  bool find_basis() {
    const int64_t nodes = row_count_ + column_count_;
    // Rounding of potentials, which are sums of costs along the tree, stays below this.
    const double tolerance = double(nodes) * 0x1p-50 * double(largest_cost_);
    simplex_.begin(row_count_, column_count_, tolerance);
    const int64_t limit = 100 * nodes + 4 * row_count_ * column_count_;
    if (!simplex_.template optimise<Accumulate>(limit)) return false;
    // Proved in double, with potentials that carry no rounding from pivots.
    for (int64_t pivots = -1; pivots != simplex_.pivots();) {
      pivots = simplex_.pivots();
      order_ = simplex_.renew_potentials();
      if (!simplex_.template optimise<double>(limit)) return false;
    }
    return true;
  }

  // Duals of nodes without mass: those of the arcs that are cheapest at the duals of the others. These arcs, which are
  // kept for consumers in partner_ and likewise for suppliers, carry no flow and are the last of the tree.
  void attach_nodes_without_mass(int64_t index) {
    double *u = dual_, *v = dual_ + n_;
    for_each_missing(rows_, row_count_, n_, [&](int64_t i) {
      for (int64_t k = 0; k < column_count_; ++k) {
        const int64_t j = columns_[k];
        const double slack = cost_of(index, i, j) - v[j];
        if (k > 0 && !(slack < u[i])) continue;
        u[i] = slack;
        partner_[i] = static_cast<int32_t>(j);
      }
    });
    for_each_missing(columns_, column_count_, m_, [&](int64_t j) {
      for (int64_t i = 0; i < n_; ++i) {
        const double slack = cost_of(index, i, j) - u[i];
        if (i > 0 && !(slack < v[j])) continue;
        v[j] = slack;
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

  // Results of one problem; false if a flow is negative by more than the rounding of the masses explains.
  bool write(int64_t index) {
    const double* potential = simplex_.potentials();
    for (int64_t i = 0; i < row_count_; ++i) dual_[rows_[i]] = potential[i] / cost_scale_;
    for (int64_t j = 0; j < column_count_; ++j) dual_[n_ + columns_[j]] = -potential[row_count_ + j] / cost_scale_;
    attach_nodes_without_mass(index);
    write_duals(index);

    Accumulate* flow = problem_.flow + index * n_ * m_;
    int32_t* basis = problem_.basis + (index + 1) * (n_ + m_ - 1);
    std::fill(flow, flow + n_ * m_, Accumulate(0));
    double value = 0, lowest = 0;
    // From the leaves inward: what a node has left passes through its arc to the root.
    const auto ship = [&](int64_t i, int64_t j, double& from, double& to) {
      const double moved = from;
      to -= moved;
      lowest = std::min(lowest, moved);
      const int64_t at = i * m_ + j;
      *--basis = static_cast<int32_t>(at);
      if (!(moved > 0)) return;
      flow[at] = static_cast<Accumulate>(moved);
      value += moved * cost_of(index, i, j);
    };
    double *supply = mass_, *demand = mass_ + n_;
    for_each_missing(columns_, column_count_, m_, [&](int64_t j) {
      const int64_t i = partner_[n_ + j];
      ship(i, j, demand[j], supply[i]);
    });
    for_each_missing(rows_, row_count_, n_, [&](int64_t i) {
      const int64_t j = partner_[i];
      ship(i, j, supply[i], demand[j]);
    });
    for (int64_t k = row_count_ + column_count_ - 1; k > 0; --k) {
      const int64_t node = order_[k], slot = simplex_.link_of(node).slot;
      const int64_t i = rows_[simplex_.row_of[slot]], j = columns_[simplex_.column_of[slot]];
      if (node < row_count_)
        ship(i, j, supply[i], demand[j]);
      else
        ship(i, j, demand[j], supply[i]);
    }
    problem_.value[index] = static_cast<Accumulate>(value);
    problem_.pivots[index] = static_cast<int32_t>(simplex_.pivots());
    return lowest >= -total_ * (n_ + m_) * (std::ldexp(1.0, -mass_bits_) + 0x1p-52);
  }

  void write_duals(int64_t index) {
    const double *u = dual_, *v = dual_ + n_;
    // Shares of the means, for sums could overflow.
    const double share_u = 0.5 / double(n_), share_v = 0.5 / double(m_);
    double shift = 0;
    for (int64_t i = 0; i < n_; ++i) shift -= u[i] * share_u;
    for (int64_t j = 0; j < m_; ++j) shift += v[j] * share_v;
    Accumulate *to_u = problem_.supply_dual + index * n_, *to_v = problem_.demand_dual + index * m_;
    for (int64_t i = 0; i < n_; ++i) to_u[i] = static_cast<Accumulate>(u[i] + shift);
    for (int64_t j = 0; j < m_; ++j) to_v[j] = static_cast<Accumulate>(v[j] - shift);
  }

  const Problem& problem_;
  const int64_t n_, m_;
  std::optional<Workspace> workspace_;
  Simplex simplex_;
  const int32_t* order_;  // of the simplex's nodes: parents before children, row 0 first
  double* mass_;          // [n + m]: supply, demand
  double* dual_;          // [n + m]: u, v
  int32_t* rows_;         // [row_count_]: suppliers that have mass
  int32_t* partner_;      // [n + m]: of nodes without mass, the other end of their arc
  int32_t* columns_;      // [column_count_]: consumers that have mass
  int64_t row_count_, column_count_;
  int mass_bits_;
  double total_;
  Accumulate largest_cost_, cost_scale_;  // in the simplex
  Accumulate* line_;                      // [stride]: a row of costs with all its columns
};

// Work that is worth a thread of its own, in entries of cost matrices.
constexpr int64_t entries_per_thread = 4096;

template <class Storage, class Accumulate>
EmdFailure emd(const EmdProblem<Storage, Accumulate>& problem) {
  const int64_t batch = problem.batch, entries = batch * problem.suppliers * problem.consumers;
  const int64_t threads = std::min({available_threads(), batch, entries / entries_per_thread + 1});
  const int64_t chunk = std::max<int64_t>(1, batch / (threads * 16));
  // Problems differ in pivots: threads take the next chunk when they are done with one. All problems before a failed
  // one are still solved, so that the failure that is reported does not depend on the threads.
  std::atomic<int64_t> next{0}, first_failed{batch};
  std::vector<EmdFailure> failures(threads);
  parallel_tasks(threads, [&](int64_t thread) {
    EmdSolver<Storage, Accumulate> solver(problem);
    for (;;) {
      const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed), end = std::min(batch, begin + chunk);
      for (int64_t index = begin; index < end; ++index) {
        if (index > first_failed.load(std::memory_order_relaxed)) return;
        const EmdFailure failure = solver.solve(index);
        if (failure.fault == EmdFault::none) continue;
        failures[thread] = failure;
        int64_t known = first_failed.load(std::memory_order_relaxed);
        while (index < known && !first_failed.compare_exchange_weak(known, index, std::memory_order_relaxed)) {
        }
        return;
      }
      if (end == batch) return;
    }
  });
  for (const EmdFailure& failure : failures)
    if (failure.fault != EmdFault::none && failure.index == first_failed) return failure;
  return {};
}

template EmdFailure emd(const EmdProblem<float, float>&);
template EmdFailure emd(const EmdProblem<double, double>&);
template EmdFailure emd(const EmdProblem<BFloat16, float>&);
template EmdFailure emd(const EmdProblem<Float16, float>&);

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
