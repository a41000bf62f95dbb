// Gradient of the optimal flow to the masses, on the CPU. With a fixed basis the flow is linear in the masses, and its
// adjoint is the sweep along the tree that also gives the duals, with the upstream gradient in place of the cost.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/memory.h"
#include "common/parallel.h"
#include "emd/problem.h"

namespace fewshot_ext {

// One problem of the batch; false where `basis` is not a tree in the order that EmdProblem::basis promises.
template <class Accumulate>
bool emd_flow_backward(const EmdFlowBackwardProblem<Accumulate>& problem, int64_t index, double* y) {
  const int64_t n = problem.suppliers, m = problem.consumers, arcs = n + m - 1;
  const int32_t* basis = problem.basis + index * arcs;
  const Accumulate* grad = problem.grad_flow + index * problem.grad_flow_strides[0];
  double* z = y + n;
  const double unknown = std::numeric_limits<double>::max();
  std::fill(y, y + n + m, unknown);
  y[0] = 0;
  double mean_y = 0, mean_z = 0;
  int64_t count_y = 0, count_z = 0;
  // Supplier 0 has mass unless the first arc, which joins a consumer to it, is that of a point without.
  if (arcs > 0 && basis[0] >= 0) ++count_y;
  for (int64_t k = 0; k < arcs; ++k) {
    const bool has_mass = basis[k] >= 0;
    const int64_t cell = has_mass ? basis[k] : -1 - int64_t(basis[k]);
    if (cell >= n * m) return false;
    const int64_t i = cell / m, j = cell % m;
    const double g = grad[i * problem.grad_flow_strides[1] + j * problem.grad_flow_strides[2]];
    if ((y[i] == unknown) == (z[j] == unknown)) return false;
    const bool joins_row = y[i] == unknown;
    if (joins_row)
      y[i] = g - z[j];
    else
      z[j] = g - y[i];
    // The first arc of a supplier 0 without mass joins a consumer that has some.
    if (!has_mass && k > 0) continue;
    (joins_row ? mean_y : mean_z) += joins_row ? y[i] : z[j];
    ++(joins_row ? count_y : count_z);
  }
  const double shift = (mean_z / double(count_z) - mean_y / double(count_y)) / 2;
  for (int64_t i = 0; i < n; ++i) problem.grad_supply[index * n + i] = static_cast<Accumulate>(y[i] + shift);
  for (int64_t j = 0; j < m; ++j) problem.grad_demand[index * m + j] = static_cast<Accumulate>(z[j] - shift);
  return true;
}

// The first problem whose basis is none, or -1.
template <class Accumulate>
int64_t emd_flow_backward(const EmdFlowBackwardProblem<Accumulate>& problem) {
  constexpr int64_t nodes_per_thread = 16384;
  const int64_t batch = problem.batch, nodes = problem.suppliers + problem.consumers;
  const int64_t threads = std::min({available_threads(), batch, batch * nodes / nodes_per_thread + 1});
  Workspace failures(static_cast<size_t>(threads) * sizeof(int64_t));
  int64_t* const failed = static_cast<int64_t*>(failures.data());
  parallel_tasks(threads, [&, failed](int64_t thread) {
    Workspace potentials(static_cast<size_t>(nodes) * sizeof(double));
    failed[thread] = -1;
    for (int64_t index = batch * thread / threads; index < batch * (thread + 1) / threads; ++index) {
      if (emd_flow_backward(problem, index, static_cast<double*>(potentials.data()))) continue;
      failed[thread] = index;
      return;
    }
  });
  const int64_t* first = std::find_if(failed, failed + threads, [](int64_t index) { return index >= 0; });
  return first == failed + threads ? -1 : *first;
}

}  // namespace fewshot_ext
