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
  for (int64_t k = 0; k < arcs; ++k) {
    if (basis[k] < 0 || basis[k] >= n * m) return false;
    const int64_t i = basis[k] / m, j = basis[k] % m;
    const double g = grad[i * problem.grad_flow_strides[1] + j * problem.grad_flow_strides[2]];
    if ((y[i] == unknown) == (z[j] == unknown)) return false;
    if (y[i] == unknown)
      y[i] = g - z[j];
    else
      z[j] = g - y[i];
  }
  double mean_y = 0, mean_z = 0;
  for (int64_t i = 0; i < n; ++i) mean_y += y[i] / double(n);
  for (int64_t j = 0; j < m; ++j) mean_z += z[j] / double(m);
  const double shift = (mean_z - mean_y) / 2;
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
