// Batches of transportation problems, described without torch: what the binding fills in and every solver reads.
#pragma once

#include <cstdint>

namespace fewshot_ext {

// min <C, F> subject to F 1 = supply, F^T 1 = demand, F >= 0, for each of `batch` problems. Strides count elements; a
// batch stride of 0 means that all problems share the tensor. Accumulate is double for float64 and float for every
// other dtype.
template <class Storage, class Accumulate>
struct EmdProblem {
  int64_t batch = 0;      // B
  int64_t suppliers = 0;  // n
  int64_t consumers = 0;  // m

  const Storage* cost = nullptr;  // [B, n, m]
  int64_t cost_strides[3] = {};
  const Storage* supply = nullptr;  // [B, n]
  int64_t supply_strides[2] = {};
  const Storage* demand = nullptr;  // [B, m]
  int64_t demand_strides[2] = {};
  // Whether the last supplier and the last consumer are dummies: whatever masses come with them, the one on the smaller
  // side has what the other side has more, and the other one has none.
  bool partial = false;

  // Results, contiguous.
  Accumulate* value = nullptr;        // [B]
  Accumulate* flow = nullptr;         // [B, n, m]
  Accumulate* supply_dual = nullptr;  // [B, n]
  Accumulate* demand_dual = nullptr;  // [B, m]
  // [B, n + m - 1]: the arcs i * m + j of the optimal tree, in an order in which each joins one node to the tree of
  // those before it, starting from supplier 0. An arc of a point without mass comes as -1 - (i * m + j).
  int32_t* basis = nullptr;
  // [B]: arcs that entered the first tree; on a GPU - fault where there is no result.
  int32_t* pivots = nullptr;
};

enum class EmdFault : int {
  none,
  cost,
  supply,
  demand,
  no_mass,
  unequal_mass,
  forbidden,  // every flow needs an arc of infinite cost
  overflow,   // the value or a dual is beyond the results' dtype
  stopped,    // by the user
  not_optimal
};

// In `pivots`, between the kernels of a GPU: a problem that is left to the exact one, from which on the number falls by
// 1 and by the pivots so far where there is a tree.
constexpr int32_t emd_unsolved = -16;

// The first problem of a batch that has no result, and why.
struct EmdFailure {
  EmdFault fault = EmdFault::none;
  int64_t index = 0;  // in the batch
  double supply_mass = 0, demand_mass = 0;
};

// Relative difference of the two masses up to which the demand is rescaled to the mass of the supply.
constexpr double emd_mass_tolerance = 1e-4;

// y [B, n] and z [B, m] with y_i + z_j = G_ij on the arcs of each basis, mean(y) = mean(z).
template <class Accumulate>
struct EmdFlowBackwardProblem {
  int64_t batch = 0;
  int64_t suppliers = 0;
  int64_t consumers = 0;
  const Accumulate* grad_flow = nullptr;  // G [B, n, m]
  int64_t grad_flow_strides[3] = {};
  const int32_t* basis = nullptr;     // [B, n + m - 1]
  Accumulate* grad_supply = nullptr;  // y
  Accumulate* grad_demand = nullptr;  // z
};

}  // namespace fewshot_ext
