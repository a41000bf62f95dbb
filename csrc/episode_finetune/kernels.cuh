// What the CUDA kernels of episode fine-tuning share: their arguments, the errors of a minibatch, the final scores.
#pragma once

#include <limits>

#include "common/four.cuh"
#include "common/reduce.cuh"
#include "episode_finetune/draws.h"
#include "episode_finetune/problem.h"

namespace fewshot_ext {

// A problem, and memory of the device for what passes from kernel to kernel.
template <class Storage>
struct EpisodeFinetune {
  using T = Accumulate<Storage>;
  EpisodeFinetuneProblem<Storage, T> problem;

  T* trained;  // [E, way, D]: final classifiers, normalized for cosines; NaN for an episode with a bad label or order
  bool* finished;  // [E]: by the kernel that trains in the span; null where it does not run
  // For training on the vectors:
  T* velocity;  // [E, way, D]
  T* errors;    // [E, 2, batch, way]: similarities and errors of a minibatch
  T* inverse;   // [E, S + way]: 1 / norms of support and classifiers, or 1
  int* seen;    // [E, S]: the last pass that has visited the feature, from 1

  __device__ __forceinline__ const Storage* support(int64_t episode, int64_t s) const {
    return problem.support + episode * problem.support_strides[0] + s * problem.support_strides[1];
  }
  __device__ __forceinline__ const T* first_weight(int64_t episode, int64_t c) const {
    return problem.weight + (episode * problem.way + c) * problem.dimensions;
  }
  __device__ __forceinline__ T* weight(int64_t episode, int64_t c) const {
    return trained + (episode * problem.way + c) * problem.dimensions;
  }
  __device__ __forceinline__ int64_t label(int64_t episode, int64_t s) const {
    return problem.target[episode * problem.support_size + s];
  }
  __device__ __forceinline__ const int64_t* order(int64_t episode, int64_t pass) const {
    return problem.order + (episode * problem.passes + pass) * problem.support_size;
  }
};

namespace finetune_device {

// 1 / |x|, as torch.nn.functional.normalize has it, from |x|^2; not a number where that has overflowed.
template <class T>
__device__ __forceinline__ T inverse_norm(T squares) {
  if (squares > std::numeric_limits<T>::max()) return std::numeric_limits<T>::quiet_NaN();
  const T norm = std::sqrt(squares > 0 ? squares : T(0));
  return T(1) / (norm > T(finetune_norm_floor) ? norm : T(finetune_norm_floor));
}

// dL/dw = raw - projection (raw . w) w for cosines. Below the floor of the norm w is divided by a constant.
template <class T>
__device__ __forceinline__ T projection(T inverse) {
  return inverse < T(1 / finetune_norm_floor) ? inverse * inverse : T(0);
}

// a . b over a warp, summed in T.
template <class T, class A, class B>
__device__ __forceinline__ T warp_dot(const A* a, const B* b, int64_t dimensions) {
  T sum = 0;
#pragma unroll 4
  for (int64_t k = threadIdx.x % warp_lanes; k < dimensions; k += warp_lanes)
    sum += T(to_accumulate(a[k])) * T(to_accumulate(b[k]));
  return warp_sum(sum);
}

// (softmax(scale (similarity - margin [c = label])) - [c = label]) * factor of one sample, by `lanes` threads that are
// neighbors: similarity(c) -> error(c, value).
template <int lanes, class T, class Similarity, class Write>
__device__ __forceinline__ void class_errors(int64_t way, int64_t label, T scale, T margin, T factor,
                                             const Similarity& similarity, const Write& write) {
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const auto logit = [&](int64_t c) { return scale * (similarity(c) - (c == label ? margin : T(0))); };
  // Rarely more than one class a lane: unrolled, these loops would only take registers.
  T highest = -std::numeric_limits<T>::infinity();
#pragma unroll 1
  for (int64_t c = lane; c < way; c += lanes) highest = max(highest, logit(c));
  highest = warp_max<lanes>(highest);
  // Each exponential once while there is a lane for every class.
  const T own = lane < way ? std::exp(logit(lane) - highest) : T(0);
  T total = own;
#pragma unroll 1
  for (int64_t c = lane + lanes; c < way; c += lanes) total += std::exp(logit(c) - highest);
  const T share = factor / warp_sum<lanes>(total);
#pragma unroll 1
  for (int64_t c = lane; c < way; c += lanes)
    write(c, (c == lane ? own : std::exp(logit(c) - highest)) * share - (c == label ? factor : T(0)));
}

// Whether the labels of an episode are classes; for all threads of the block.
template <class Storage>
__device__ __forceinline__ bool labels_in_range(const EpisodeFinetune<Storage>& p, int64_t episode) {
  int bad = 0;
  for (int64_t s = threadIdx.x; s < p.problem.support_size; s += blockDim.x) {
    const int64_t label = p.label(episode, s);
    bad |= label < 0 || label >= p.problem.way;
  }
  return !__syncthreads_or(bad);
}

// Whether the row is a permutation; for all threads of the block. `seen` [S] starts below the first `pass`.
__device__ __forceinline__ bool is_permutation(const int64_t* row, int64_t size, int pass, int* seen) {
  int bad = 0;
  for (int64_t k = threadIdx.x; k < size; k += blockDim.x) {
    const int64_t s = row[k];
    bad |= s < 0 || s >= size || atomicExch(&seen[s], pass) == pass;
  }
  return !__syncthreads_or(bad);
}

template <class Storage>
__device__ __forceinline__ void poison(const EpisodeFinetune<Storage>& p, int64_t episode) {
  using T = Accumulate<Storage>;
  T* weight = p.weight(episode, 0);
  for (int64_t k = threadIdx.x; k < p.problem.way * p.problem.dimensions; k += blockDim.x)
    weight[k] = std::numeric_limits<T>::quiet_NaN();
}

}  // namespace finetune_device

struct ScoreQueries {
  static constexpr int warps = 8, threads = warps * warp_lanes;
  static constexpr int classes = 4;  // at a time
};

// A warp for each query.
template <class Storage>
__global__ void __launch_bounds__(ScoreQueries::threads)
    finetune_score_queries(const __grid_constant__ EpisodeFinetune<Storage> p) {
  using T = Accumulate<Storage>;
  constexpr int most = ScoreQueries::classes;
  const int lane = static_cast<int>(threadIdx.x) % warp_lanes;
  const int64_t index = int64_t(blockIdx.x) * ScoreQueries::warps + threadIdx.x / warp_lanes;
  const auto& problem = p.problem;
  if (index >= problem.episodes * problem.query_size) return;
  const int64_t episode = index / problem.query_size, q = index % problem.query_size;
  const Storage* query = problem.query + episode * problem.query_strides[0] + q * problem.query_strides[1];
  const T scale = problem.settings.cosine
                      ? finetune_device::inverse_norm(finetune_device::warp_dot<T>(query, query, problem.dimensions))
                      : T(1);
  for (int64_t first = 0; first < problem.way; first += most) {
    T sum[most] = {};
    for (int64_t k = lane; k < problem.dimensions; k += warp_lanes) {
      const T x = to_accumulate(query[k]);
#pragma unroll
      for (int c = 0; c < most; ++c)
        if (first + c < problem.way) sum[c] += x * p.weight(episode, first + c)[k];
    }
#pragma unroll
    for (int c = 0; c < most; ++c) {
      const T dot = warp_sum(sum[c]);
      if (lane == 0 && first + c < problem.way) problem.scores[index * problem.way + first + c] = dot * scale;
    }
  }
}

struct DrawEpisodes {
  static constexpr int threads = 256;
};

template <class T>
__global__ void __launch_bounds__(DrawEpisodes::threads) draw_first_weights(EpisodeDraws draws, T bound) {
  const int64_t index = int64_t(blockIdx.x) * DrawEpisodes::threads + threadIdx.x;
  const int64_t each = draws.way * draws.dimensions;
  if (index >= draws.episodes * each) return;
  static_cast<T*>(draws.weight)[index] =
      draws.weights(index / each).symmetric(static_cast<uint64_t>(index % each), bound);
}

static __global__ void __launch_bounds__(DrawEpisodes::threads) draw_orders(EpisodeDraws draws) {
  const int64_t index = int64_t(blockIdx.x) * DrawEpisodes::threads + threadIdx.x;
  if (index < draws.episodes * draws.passes) draws.draw_order(index / draws.passes, index % draws.passes);
}

}  // namespace fewshot_ext
