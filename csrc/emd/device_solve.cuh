// One problem of a batch, solved by a team of threads of a GPU: its points and costs into the team's memory, the
// simplex, and results that are proved.
#pragma once

#include "emd/device_cost.cuh"
#include "emd/device_simplex.cuh"

namespace fewshot_ext {

namespace emd_device {

// No numbers, and a tree that keeps the backward pass in bounds; by `threads` of which this is one.
template <class Storage>
__device__ __forceinline__ void poison(const EmdProblemOf<Storage>& p, int64_t index, int32_t state, int thread,
                                       int threads) {
  constexpr Accumulate<Storage> nan = std::numeric_limits<Accumulate<Storage>>::quiet_NaN();
  const int n = static_cast<int>(p.suppliers), m = static_cast<int>(p.consumers);
  for (int cell = thread; cell < n * m; cell += threads) p.flow[index * n * m + cell] = nan;
  for (int i = thread; i < n; i += threads) p.supply_dual[index * n + i] = nan;
  for (int j = thread; j < m; j += threads) p.demand_dual[index * m + j] = nan;
  for (int k = thread; k < n + m - 1; k += threads) p.basis[index * (n + m - 1) + k] = k < m ? k : (k - m + 1) * m;
  if (thread == 0) {
    p.value[index] = nan;
    p.pivots[index] = state;
  }
}

// Sums over a warp, the same in every warp of a team.
template <class Value>
__device__ __forceinline__ double sum(int count, Value value) {
  double total = 0;
#pragma unroll 1
  for (int k = static_cast<int>(threadIdx.x) % warp_lanes; k < count; k += warp_lanes) total += value(k);
  return warp_sum(total);
}

template <class T, class Team>
struct SolveMemory {
  using Simplex = DeviceSimplex<T, Team, CopiedCost<T, Team>>;

  typename Simplex::Memory simplex;
  // The points that are in the problem: suppliers, then consumers, by their numbers among the n + m.
  uint16_t point[Team::nodes];
  int rows, columns, root;
  double largest_allowed;  // of the costs that are no stand-ins for infinity
};

// Problem `index` of a batch, solved by a team. Arithmetic is that of double where an honest bound of its rounding
// proves the value; what it cannot prove is left to emd_exactly_by_warps, as what `pivots` holds then says.
template <class Storage, class Team>
class Solve {
  using T = Accumulate<Storage>;
  using Cost = CopiedCost<T, Team>;
  using Simplex = DeviceSimplex<T, Team, Cost>;

 public:
  using Memory = SolveMemory<T, Team>;

  // `copy`: room for the costs.
  __device__ __forceinline__ Solve(const EmdProblemOf<Storage>& problem, int64_t index, Memory& memory, T* copy)
      : team_(memory.simplex.team),
        p_(problem),
        n_(static_cast<int>(problem.suppliers)),
        m_(static_cast<int>(problem.consumers)),
        index_(index),
        memory_(memory),
        cost_(copy, 0, 0) {}

  // The three steps, each from memory to memory. Negative: what give_up() takes.

  __device__ __forceinline__ int32_t prepare() {
    const bool good_masses = choose_points();
    take_points();
    if (rows_ == 0 || columns_ == 0) return fault(good_masses ? EmdFault::no_mass : EmdFault::supply);
    uint64_t cost_bits = copy_costs();
    if (rows_ < n_ || columns_ < m_) cost_bits = max(cost_bits, look_at_costs());
    cost_bits = team_.max(good_masses ? cost_bits : ~uint64_t(0));
    constexpr uint64_t infinity = sizeof(T) == 8 ? 0x7ff0000000000000ull : 0x7f800000ull;
    if (cost_bits > infinity) return fault(good_masses ? EmdFault::cost : EmdFault::supply);
    T allowed = from_magnitude_bits<T>(cost_bits), largest = allowed;
    if (cost_bits == infinity) {
      allowed = from_magnitude_bits<T>(team_.max(largest_allowed()));
      largest = replace_infinity(allowed);
    }
    if (team_.thread() == 0) {
      memory_.largest_allowed = allowed;
      memory_.simplex.largest_cost = largest;
    }
    const Masses masses = load_masses();
    if (!(masses.supply > 0 && masses.demand > 0)) return fault(EmdFault::no_mass);
    // Beyond these, sums would overflow and ratios lose digits.
    constexpr T most_cost = sizeof(T) == 8 ? T(0x1p1000) : T(0x1p110);
    if (!(largest <= most_cost && masses.total >= 0x1p-900 && max(masses.supply, masses.demand) <= 0x1p1000))
      return emd_unsolved;
    if (!p_.partial && !masses.agree()) return fault(EmdFault::unequal_mass);
    share_masses(masses);
    return 0;
  }

  __device__ __forceinline__ int32_t solve() {
    take_points();
    Simplex simplex(team_, memory_.simplex, cost_, rows_, columns_);
    return simplex.solve(p_.partial) ? 0 : emd_unsolved;
  }

  // Results, if they are proved.
  __device__ __forceinline__ int32_t finish() {
    take_points();
    Simplex simplex(team_, memory_.simplex, cost_, rows_, columns_);
    simplex.take_tree();
    double* const mass = memory_.simplex.scratch;
    const Masses masses = load_masses();
    for (int k = rows_ + team_.thread(); k < nodes(); k += Team::threads) mass[k] *= -masses.match;
    simplex.team.sync();

    // What lies below an arc passes through it. Masses come in two parts: multiples of a unit so coarse that sums of
    // them are exact, and rests that are so small that the rounding of their sums is.
    const double split = 0x1.8p+2 * bit_cast<double>(bit_cast<uint64_t>(masses.total) & 0x7ff0000000000000ull);
    double flows[Team::nodes_each];
    double deficit = 0, value = 0;
    int deepest = 0;
    simplex.each_slot([&](int s, int slot, Arc arc) {
      const bool supplier_is_child = simplex.supplier_is_child(slot, arc);
      double units = 0, rests = 0;
#pragma unroll 8
      for (int k = 0; k < nodes(); ++k) {
        const double part = (mass[k] + split) - split;
        const bool below = simplex.on_path(slot, k);
        units += below ? part : 0;
        rests += below ? mass[k] - part : 0;
      }
      const double surplus = units + rests, moved = supplier_is_child ? surplus : -surplus;
      flows[s] = moved > 0 ? moved : 0;
      const T cost = simplex.cost(arc);
      // Whether a forbidden arc has to be used is no question of rounding.
      deficit += cost > memory_.largest_allowed ? std::numeric_limits<double>::infinity() : flows[s] - moved;
      value += flows[s] * double(cost);
      deepest = max(deepest, simplex.depth(supplier_is_child ? arc.supplier : rows_ + arc.consumer));
    });
    value = simplex.team.sum(value);
    deficit = simplex.team.sum(deficit);
    const bool proved = is_proved(simplex, masses.total, value, deficit, deepest);
    if (proved) {
      if (!(std::abs(static_cast<T>(value)) <= most)) return fault(EmdFault::overflow);
      // Costs of large problems were here.
      for (int cell = team_.thread(); cell < n_ * m_; cell += Team::threads) flow()[cell] = 0;
      simplex.team.sync();
      simplex.each_slot([&](int s, int, Arc arc) { flow()[cell_of(arc)] = static_cast<T>(flows[s]); });
      find_duals(masses);
    }
    write_basis(simplex, proved ? memory_.root : 0, proved && supplier_of(0) != 0);
    if (!proved) return emd_unsolved - 1 - simplex.pivots();
    double* const dual = memory_.simplex.scratch;
    for (int i = team_.thread(); i < n_; i += Team::threads) p_.supply_dual[index_ * n_ + i] = static_cast<T>(dual[i]);
    for (int j = team_.thread(); j < m_; j += Team::threads)
      p_.demand_dual[index_ * m_ + j] = static_cast<T>(dual[n_ + j]);
    if (team_.thread() == 0) {
      p_.value[index_] = static_cast<T>(value);
      p_.pivots[index_] = simplex.pivots();
    }
    return 0;
  }

  // Without a result, or for emd_exactly_by_warps.
  __device__ __forceinline__ void give_up(int32_t state) {
    if (state > emd_unsolved) return poison<Storage>(p_, index_, state, team_.thread(), Team::threads);
    if (team_.thread() == 0) p_.pivots[index_] = state;
  }

 private:
  static constexpr T nan = std::numeric_limits<T>::quiet_NaN();
  static constexpr T most = std::numeric_limits<T>::max();
  // Up to which error of the value, relative to the value, arithmetic in double will do: that of the CPU.
  static constexpr double accuracy = sizeof(T) == 4 ? 0x1p-30 : 0x1p-40;

  struct Masses {
    double supply, demand, total, match;

    __device__ __forceinline__ bool agree() const {
      return std::abs(supply - demand) <= emd_mass_tolerance * max(supply, demand);
    }
  };

  __device__ __forceinline__ void take_points() {
    rows_ = memory_.rows;
    columns_ = memory_.columns;
    cost_ = Cost(cost_.at, rows_, columns_);
  }

  __device__ __forceinline__ T* flow() const { return p_.flow + index_ * n_ * m_; }
  __device__ __forceinline__ int32_t* basis() const { return p_.basis + index_ * (n_ + m_ - 1); }
  __device__ __forceinline__ int nodes() const { return rows_ + columns_; }
  __device__ __forceinline__ int supplier_of(int row) const { return memory_.point[row]; }
  __device__ __forceinline__ int consumer_of(int column) const { return memory_.point[rows_ + column] - n_; }

  __device__ __forceinline__ int cell_of(Arc arc) const {
    return supplier_of(arc.supplier) * m_ + consumer_of(arc.consumer);
  }

  __device__ __forceinline__ bool is_dummy(int v) const { return p_.partial && (v == n_ - 1 || v == n_ + m_ - 1); }

  // As it is given; dummies get theirs later.
  __device__ __forceinline__ double mass_of(int v) const {
    if (is_dummy(v)) return 0;
    const int64_t* strides = v < n_ ? p_.supply_strides : p_.demand_strides;
    const Storage* from = v < n_ ? p_.supply : p_.demand;
    return to_accumulate(from[index_ * strides[0] + (v < n_ ? v : v - n_) * strides[1]]);
  }

  // Finds the points that are in the problem. False where one of the thread's masses is negative or not finite.
  __device__ __forceinline__ bool choose_points() {
    bool good = true;
    if (team_.warp() == 0) {
      const int lane = team_.lane();
      int rows = 0, count = 0;
      for (int first = 0; first < n_ + m_; first += warp_lanes) {
        const int v = first + lane;
        const double mass = v < n_ + m_ ? mass_of(v) : 0;
        good &= mass >= 0 && mass <= std::numeric_limits<double>::max();
        const bool kept = v < n_ + m_ && (mass > 0 || is_dummy(v));
        const unsigned all = __ballot_sync(all_lanes, kept);
        if (kept) memory_.point[count + __popc(all & ((1u << lane) - 1))] = static_cast<uint16_t>(v);
        rows += __popc(__ballot_sync(all_lanes, kept && v < n_));
        count += __popc(all);
      }
      if (lane == 0) {
        memory_.rows = rows;
        memory_.columns = count - rows;
      }
    }
    team_.sync();
    return good;
  }

  // The masses of the points to scratch, and their sums. Ends with a barrier.
  __device__ __forceinline__ Masses load_masses() {
    double* const mass = memory_.simplex.scratch;
    for (int k = team_.thread(); k < nodes(); k += Team::threads) mass[k] = mass_of(memory_.point[k]);
    team_.sync();
    Masses masses;
    masses.supply = sum(rows_, [=](int i) { return mass[i]; });
    masses.demand = sum(columns_, [=, this](int j) { return mass[rows_ + j]; });
    masses.total = p_.partial ? max(masses.supply, masses.demand) : masses.supply;
    masses.match = p_.partial ? 1 : masses.supply / masses.demand;
    team_.sync();
    if (p_.partial) {
      if (team_.thread() == 0) {
        mass[rows_ - 1] = masses.total - masses.supply;
        mass[nodes() - 1] = masses.total - masses.demand;
      }
      team_.sync();
    }
    return masses;
  }

  // From masses to what the simplex takes: parts of their side's, or 0 for dummies.
  __device__ __forceinline__ void share_masses(const Masses& masses) {
    double* const mass = memory_.simplex.scratch;
    for (int k = team_.thread(); k < nodes(); k += Team::threads) {
      const bool dummy = p_.partial && (k == rows_ - 1 || k == nodes() - 1);
      mass[k] = dummy ? 0 : mass[k] / (p_.partial ? masses.total : k < rows_ ? masses.supply : masses.demand);
    }
  }

  // Calls visit(i, j) for the thread's share of rows and columns, the same at each call.
  template <class Visit>
  __device__ __forceinline__ void each_cell(int rows, int columns, Visit visit) const {
#pragma unroll 1
    for (int j = team_.lane(); j < columns; j += warp_lanes) {
#pragma unroll 1
      for (int i = team_.warp(); i < rows; i += Team::warps) visit(i, j);
    }
  }

  // In the order of magnitudes, with what is no cost beyond infinity.
  __device__ static __forceinline__ uint64_t bits_of_cost(T cost) {
    return cost < -most ? ~uint64_t(0) : magnitude_bits(cost);
  }

  // The greatest bits_of_cost among the thread's share of those between points that have mass. Costs are read some at a
  // time, for what is written may be what others are read from, as far as the compiler knows.
  __device__ __forceinline__ uint64_t copy_costs() const {
    constexpr int at_once = 16;
    const GlobalCost<Storage> from(p_, index_);
    const int filled = Cost::filled_rows(rows_);
    uint64_t bits = 0;
#pragma unroll 1
    for (int j = team_.lane(); j < columns_; j += warp_lanes) {
#pragma unroll 1
      for (int first = team_.warp(); first < filled; first += at_once * Team::warps) {
        T costs[at_once];
#pragma unroll
        for (int k = 0; k < at_once; ++k)
          costs[k] = from(supplier_of(min(first + k * Team::warps, rows_ - 1)), consumer_of(j));
#pragma unroll
        for (int k = 0; k < at_once; ++k) {
          const int i = first + k * Team::warps;
          bits = max(bits, bits_of_cost(costs[k]));
          if (i < filled) cost_(i, j) = i < rows_ ? costs[k] : std::numeric_limits<T>::infinity();
        }
      }
    }
    return bits;
  }

  // Whether one of all costs is none: 0, or the greatest bits.
  __device__ __forceinline__ uint64_t look_at_costs() const {
    const GlobalCost<Storage> from(p_, index_);
    bool good = true;
    each_cell(n_, m_, [&](int i, int j) { good &= from(i, j) >= -most; });
    return good ? 0 : ~uint64_t(0);
  }

  __device__ __forceinline__ uint64_t largest_allowed() const {
    uint64_t bits = 0;
    each_cell(rows_, columns_, [&](int i, int j) {
      if (cost_(i, j) <= most) bits = max(bits, magnitude_bits(cost_(i, j)));
    });
    return bits;
  }

  // By a cost beyond those of all arcs that are allowed, which is returned.
  __device__ __forceinline__ T replace_infinity(T allowed) const {
    const T stand_in = allowed > 0 ? 2 * allowed : T(1);
    each_cell(rows_, columns_, [&](int i, int j) {
      if (cost_(i, j) > most) cost_(i, j) = stand_in;
    });
    return stand_in;
  }

  // Whether the error of the value, by an honest bound, is as small as it shall be.
  __device__ __forceinline__ bool is_proved(Simplex& simplex, double total, double value, double deficit, int deepest) {
    double largest_potential = 0;
    if constexpr (sizeof(T) == 8) {
      uint64_t bits = 0;
      for (int k = team_.thread(); k < nodes(); k += Team::threads)
        bits = max(bits, magnitude_bits(memory_.simplex.potential[k]));
      largest_potential = from_magnitude_bits<double>(simplex.team.max(bits));
    } else {
      deepest = static_cast<int>(simplex.team.max(static_cast<uint64_t>(deepest)));
    }
    // What rounding has done to flows, all of which add up to the total, amounts to other masses; so does what was left
    // out below 0. Masses that differ by d in all change the optimum by at most 2 d times the largest cost. In units
    // of 2^-53 of the total, a flow is rounded once and counts at both its ends, a demand once when it is matched, by a
    // ratio of two sums over lanes, and in a problem with dummies these take differences of such sums. And the value is
    // a sum of products.
    const double price = memory_.simplex.largest_cost;
    const double roundings = 2 * (2 * (nodes() / warp_lanes + 7) + 5) + 16;
    const double error =
        total * (0x1p-53 * (roundings * price + simplex.dual_error(deepest, largest_potential))) + 4 * price * deficit;
    const double acceptable = accuracy * std::abs(value);
    const double rounding_of_flows = nodes() * (1 / double(int64_t(1) << Simplex::mass_bits) + 0x1p-52);
    if (!(deficit <= rounding_of_flows * total)) return false;
    // Not where products were rounded near the smallest numbers.
    return price == 0 || (error + 0x1p-1000 <= acceptable && acceptable <= std::numeric_limits<double>::max());
  }

  // The arcs of the tree that grows from `root`, behind `before` others.
  __device__ __forceinline__ void write_basis(Simplex& simplex, int root, int before) {
    int* const order = memory_.simplex.arc;  // by depth, then by slot
    simplex.move_root(root);
    simplex.each_slot([&](int, int slot, Arc arc) {
      const int child = simplex.supplier_is_child(slot, arc) ? arc.supplier : rows_ + arc.consumer;
      order[slot] = simplex.depth(child) * Team::nodes + slot;
    });
    simplex.team.sync();
    simplex.each_slot([&](int, int slot, Arc arc) {
      const int own = order[slot];
      int position = before;
#pragma unroll 8
      for (int k = 0; k < nodes() - 1; ++k) position += order[k] < own;
      basis()[position] = cell_of(arc);
    });
  }

  // Duals of all points in scratch, by their numbers among the n + m: the same mean for both sides, or none for the
  // dummy that takes what is not moved. Finds memory.root. Begins and ends with a barrier.
  __device__ __forceinline__ void find_duals(const Masses& masses) {
    const double* const potential = memory_.simplex.potential;
    double* const dual = memory_.simplex.scratch;
    const double mean_u = sum(rows_, [=](int i) { return potential[i]; }) / rows_;
    const double mean_v = -sum(columns_, [=, this](int j) { return potential[rows_ + j]; }) / columns_;
    double shift = (mean_v - mean_u) / 2;
    if (p_.partial) shift = masses.supply >= masses.demand ? -potential[nodes() - 1] : -potential[rows_ - 1];
    team_.sync();
    for (int k = team_.thread(); k < nodes(); k += Team::threads)
      dual[memory_.point[k]] = k < rows_ ? potential[k] + shift : -potential[k] - shift;
    if (team_.thread() == 0) memory_.root = 0;
    team_.sync();
    if (nodes() == n_ + m_) return;
    attach<true>();
    team_.sync();
    attach<false>();
    team_.sync();
  }

  // Duals of suppliers, or consumers, without mass: those of the arcs that are cheapest at the duals of the others.
  // These arcs stand behind all others in the basis, but for that of supplier 0, from whose other end the tree grows.
  template <bool suppliers>
  __device__ __forceinline__ void attach() {
    const GlobalCost<Storage> cost(p_, index_);
    double* const dual = memory_.simplex.scratch;
    for (int v = (suppliers ? 0 : n_) + team_.warp(); v < (suppliers ? n_ : n_ + m_); v += Team::warps) {
      int before = 0;
      bool has_mass = false;
      for (int k = team_.lane(); k < nodes(); k += warp_lanes) {
        before += memory_.point[k] < v;
        has_mass |= memory_.point[k] == v;
      }
      if (__any_sync(all_lanes, has_mass)) continue;
      before = warp_sum(before);
      const int count = suppliers ? columns_ : n_;
      double least = most;
      int nearest = count;
      for (int k = team_.lane(); k < count; k += warp_lanes) {
        const double slack =
            suppliers ? double(cost(v, consumer_of(k))) - dual[n_ + consumer_of(k)] : double(cost(k, v - n_)) - dual[k];
        if (!(slack < least)) continue;
        least = slack;
        nearest = k;
      }
      const double least_of_all = warp_reduce(least, [](double a, double b) { return a < b ? a : b; });
      nearest = warp_reduce(least == least_of_all ? nearest : count, [](int a, int b) { return a < b ? a : b; });
      // No arc is allowed.
      if (nearest == count) nearest = suppliers ? 0 : supplier_of(0);
      if (team_.lane() != 0) continue;
      dual[v] = max(least_of_all, -double(most));
      // Those before it that have no mass are v - before.
      const int position = v == 0 ? 0 : nodes() - 1 + v - before;
      basis()[position] = -1 - (suppliers ? v * m_ + consumer_of(nearest) : nearest * m_ + v - n_);
      if (v == 0) memory_.root = rows_ + nearest;
    }
  }

  __device__ static __forceinline__ int32_t fault(EmdFault fault) { return -static_cast<int32_t>(fault); }

  Team team_;
  const EmdProblemOf<Storage>& p_;
  const int n_, m_;
  int rows_ = 0, columns_ = 0;
  const int64_t index_;
  Memory& memory_;
  Cost cost_;
};

// Runs the steps of what begin() returns, anew for each: the compiler, which is not told that all are taken, cannot
// keep in registers through the simplex, which needs them, what it computed for the step before.
template <class Begin>
__device__ __forceinline__ void in_steps(Begin begin) {
  int32_t state = 0;
  if (forgotten(true)) state = begin().prepare();
  if (forgotten(state == 0)) state = begin().solve();
  if (forgotten(state == 0)) state = begin().finish();
  if (state < 0) begin().give_up(state);
}

}  // namespace emd_device

}  // namespace fewshot_ext
