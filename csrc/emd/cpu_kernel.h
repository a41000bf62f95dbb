// Batches of transportation problems on the CPU. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
#pragma once

#include "common/cancellation.h"
#include "common/denormals.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "emd/cpu_machine.h"
#include "emd/exact_solver.h"
#include "emd/problem.h"
#include "emd/simplex.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// One thread's solver: memory for one problem, used again for the next.
template <class Storage, class Accumulate>
class EmdSolver : private ExactSolver<Storage, Accumulate, CpuMachine> {
  using Base = ExactSolver<Storage, Accumulate, CpuMachine>;
  using Problem = typename Base::Problem;
  using Simplex = TransportSimplex<Accumulate>;
  // Beyond, the sets of TransportSimplex would take more memory than most costs do.
  static constexpr int64_t most_bytes_of_sets = int64_t(64) << 20;

 public:
  EmdSolver(const Problem& problem, Cancellation& cancellation)
      : Base(problem),
        cancellation_(cancellation),
        machine_(cancellation),
        has_sets_(std::min(n_, m_) > 1 && Simplex::bytes_of_sets(n_, m_) <= most_bytes_of_sets) {
    ByteArena sizes{};
    lay_out(sizes);
    workspace_.emplace(static_cast<size_t>(sizes.bytes.used));
    ByteArena arena{{static_cast<unsigned char*>(workspace_->data())}};
    lay_out(arena);
    simplex_.cost = cost_;
  }

  EmdFailure solve(int64_t index) {
    EmdFailure failure;
    failure.index = index;
    Base::open(index);
    failure.fault = Base::load_masses(failure);
    if (failure.fault == EmdFault::none) failure.fault = load_cost();
    if (failure.fault == EmdFault::none && !solve_in_double()) failure.fault = solve_exactly();
    if (failure.fault == EmdFault::none && !Base::write()) failure.fault = EmdFault::overflow;
    return failure;
  }

 private:
  using Base::accuracy, Base::basis_, Base::column_count_, Base::columns_, Base::cost_, Base::cost_exponent_,
      Base::dual_, Base::exact_, Base::forbids_, Base::in_range_, Base::index_, Base::largest_cost_, Base::m_,
      Base::mass_, Base::n_, Base::order_, Base::parent_, Base::pivots_, Base::problem_, Base::row_count_, Base::rows_,
      Base::star_, Base::stride_, Base::supply_is_more_, Base::total_, Base::tree_flow_, Base::value_;
  using Base::column_at, Base::cost, Base::is_dummy, Base::pivot_limit, Base::row_at;

  void lay_out(ByteArena& arena) {
    cost_ = arena.template take<Accumulate>(Simplex::cost_rows(n_) * Simplex::cost_stride(m_));
    if (has_sets_) simplex_.lay_out(arena, n_, m_);
    start_.lay_out(arena, n_, Simplex::cost_stride(m_));
    Base::lay_out(arena);
    line_ = arena.template take<Accumulate>(Simplex::cost_stride(m_));
  }

  // Masses as integers, with the perturbation of the simplex.
  void scale_masses() {
    const int row_bits = 64 - __builtin_clzll(static_cast<uint64_t>(n_));  // 2^row_bits > n
    const int slot_bits = Simplex::slot_bits(row_count_, column_count_);
    const double scale = std::ldexp(1.0, 61 - row_bits - slot_bits);
    int64_t difference = 0, largest = 0;
    for (int64_t k = 0; k < row_count_; ++k) {
      const int64_t i = rows_[k];
      const int64_t units = is_dummy(i, n_) ? 0 : static_cast<int64_t>(mass_[i] / total_ * scale + 0.5);
      difference += units;
      simplex_.supply[k] = (units << row_bits) + 1;
    }
    for (int64_t k = 0; k < column_count_; ++k) {
      const int64_t j = columns_[k];
      // Rows, unlike columns, may have no mass but the perturbation's.
      const int64_t units =
          is_dummy(j, m_) ? 0 : std::max<int64_t>(1, static_cast<int64_t>(mass_[n_ + j] / total_ * scale + 0.5));
      difference -= units;
      simplex_.demand[k] = units << row_bits;
      if (simplex_.demand[k] > simplex_.demand[largest]) largest = k;
    }
    if (problem_.partial) {
      largest = column_count_ - 1;
      if (difference < 0) {
        simplex_.supply[row_count_ - 1] -= difference << row_bits;
        difference = 0;
      }
    }
    simplex_.demand[largest] += (difference << row_bits) + row_count_;
    for (int64_t k = 0; k < row_count_; ++k) simplex_.supply[k] <<= slot_bits;
    for (int64_t k = 0; k < column_count_; ++k) simplex_.demand[k] <<= slot_bits;
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
    std::fill(cost_ + kept * stride_, cost_ + Simplex::cost_rows(kept) * stride_, Simplex::no_arc);
    largest_cost_ = -horizontal_min<Accumulate>(-largest);
    forbids_ = false;
    if (!(horizontal_sum<Accumulate>(zero) == 0) && !Base::admit_infinity()) return EmdFault::cost;
    cost_exponent_ = 0;
    if (largest_cost_ > Simplex::largest_cost) Base::scale_costs();
    if (forbids_) Base::forbid_arcs();
    return EmdFault::none;
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
    const int64_t limit = pivot_limit();
    scale_masses();
    if (!simplex_.begin(row_count_, column_count_, largest, start_, cancellation_)) return false;
    // However far this comes: rounding could send it round in circles.
    simplex_.template optimize<Accumulate>(8 * nodes, cancellation_);
    bool optimal = true;
    // Proved in double, with potentials that carry no rounding from pivots.
    for (int64_t pivots = -1; pivots != simplex_.pivots();) {
      pivots = simplex_.pivots();
      order_ = simplex_.renew_potentials(parent_);
      if (optimal) optimal = simplex_.template optimize<double>(limit, cancellation_);
    }
    pivots_ = simplex_.pivots();
    const double scale = Base::cost_scale();
    for (int64_t i = 0; i < row_count_; ++i) dual_[rows_[i]] = simplex_.row_potentials()[i] * scale;
    for (int64_t j = 0; j < column_count_; ++j) dual_[n_ + columns_[j]] = -simplex_.column_potentials()[j] * scale;
    tolerance_ = simplex_.tolerance() * scale;
    return optimal;
  }

  // Flows, from the leaves inward: what a node has left passes through its arc to the root. And the value; false where
  // rounding may have had a part in it that counts.
  bool ship() {
    double value = 0, magnitude = 0, deficit = 0, changed = 0;
    const double scale = Base::cost_scale();
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
      // Whether a forbidden arc has to be used is no question of rounding.
      allowed &= !(c > largest_cost_);
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
    return Base::solve_exactly(machine_, [&] {
      if (order_) {
        for (int64_t k = row_count_ + column_count_ - 1; k > 0; --k)
          Base::serve_if_open(row_at(order_[k]), column_at(order_[k]));
      } else {
        pivots_ = 0;
        start_.run(cost_, stride_, row_count_, column_count_, cancellation_,
                   [&](int64_t i, int64_t j) { return exact_.serve(i, j); });
      }
    });
  }

  Cancellation& cancellation_;
  CpuMachine machine_;
  const bool has_sets_;  // for a first tree by TransportSimplex
  std::optional<Workspace> workspace_;
  Simplex simplex_;
  RegretStart<Accumulate> start_;
  Accumulate* line_;  // [stride]: a row of costs with all its columns
  double tolerance_;
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
