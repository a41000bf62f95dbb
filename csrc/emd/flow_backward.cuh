// Gradient of the optimal flow to the masses, a warp for each problem.
#pragma once

#include <limits>

#include "common/reduce.cuh"
#include "emd/problem.h"

namespace fewshot_ext {

template <int most_nodes_>
struct EmdFlowBackward {
  static constexpr int most_nodes = most_nodes_;
  static constexpr int warps = most_nodes <= 512 ? 4 : 2, threads = warps * warp_lanes;  // up to 32 KiB of potentials
};

// Each arc of the basis joins one node to the tree of the arcs before it. Of 32 arcs at a time, those that have met
// the tree give their other node its potential, until all have. Where that leaves out a node, because a direct call
// passed no tree, the results are NaN. The means are those over points that have mass; of the first arc's ends it is
// supplier 0 that may be without.
template <class T, int most_nodes>
__global__ void __launch_bounds__(EmdFlowBackward<most_nodes>::threads)
    emd_flow_backward_by_warps(EmdFlowBackwardProblem<T> p) {
  using Size = EmdFlowBackward<most_nodes>;
  FEWSHOT_EXT_SHARED(double, potentials, [Size::warps][Size::most_nodes]);
  constexpr double unknown = std::numeric_limits<double>::max();
  const int warp = static_cast<int>(threadIdx.x) / warp_lanes, lane = static_cast<int>(threadIdx.x) % warp_lanes;
  const int64_t index = int64_t(blockIdx.x) * Size::warps + warp;
  if (index >= p.batch) return;

  const int n = static_cast<int>(p.suppliers), m = static_cast<int>(p.consumers), arcs = n + m - 1;
  const int32_t* basis = p.basis + index * arcs;
  const T* grad = p.grad_flow + index * p.grad_flow_strides[0];
  double* const y = potentials[warp];
  double* const z = y + n;
  for (int v = lane; v < n + m; v += warp_lanes) y[v] = v == 0 ? 0.0 : unknown;
  __syncwarp(all_lanes);

  double sum_y = 0, sum_z = 0;
  int count_y = lane == 0 && (arcs == 0 || basis[0] >= 0), count_z = 0;
  for (int first = 0; first < arcs; first += warp_lanes) {
    const int arc = first + lane < arcs ? basis[first + lane] : n * m;
    const bool counts = arc >= 0 || first + lane == 0;
    const int cell = arc >= 0 ? arc : -1 - arc;
    bool waits = cell < n * m;
    const int i = waits ? cell / m : 0, j = waits ? cell % m : 0;
    const double g = waits ? double(grad[i * p.grad_flow_strides[1] + j * p.grad_flow_strides[2]]) : 0.0;
    for (;;) {
      const double of_supplier = y[i], of_consumer = z[j];
      const bool ready = waits && (of_supplier == unknown) != (of_consumer == unknown);
      __syncwarp(all_lanes);
      if (ready) {
        if (of_supplier == unknown) {
          y[i] = g - of_consumer;
          sum_y += counts ? y[i] : 0;
          count_y += counts;
        } else {
          z[j] = g - of_supplier;
          sum_z += counts ? z[j] : 0;
          count_z += counts;
        }
      }
      waits = waits && !ready;
      __syncwarp(all_lanes);
      if (!__any_sync(all_lanes, ready) || !__any_sync(all_lanes, waits)) break;
    }
  }

  bool all_reached = true;
  for (int v = lane; v < n + m; v += warp_lanes) all_reached &= y[v] != unknown;
  double shift = (warp_sum(sum_z) / warp_sum(count_z) - warp_sum(sum_y) / warp_sum(count_y)) / 2;
  if (!__all_sync(all_lanes, all_reached)) shift = std::numeric_limits<double>::quiet_NaN();
  for (int i = lane; i < n; i += warp_lanes) p.grad_supply[index * n + i] = static_cast<T>(y[i] + shift);
  for (int j = lane; j < m; j += warp_lanes) p.grad_demand[index * m + j] = static_cast<T>(z[j] - shift);
}

}  // namespace fewshot_ext
