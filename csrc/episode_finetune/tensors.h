// Binding of episode fine-tuning for any device: tensors in, EpisodeFinetuneProblem out, the device's kernels called.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>

#include "common/half.h"
#include "common/new_tensor.h"
#include "episode_finetune/draws.h"
#include "episode_finetune/problem.h"

namespace fewshot_ext {

namespace episode_finetune_tensors {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline ScalarType accumulate_type(const Tensor& features) {
  return features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The environment may name the form, for tests and benchmarks of each.
inline FinetuneForm form_by_environment() {
  const char* variable = std::getenv("FEWSHOT_EXT_EPISODE_FINETUNE_FORM");
  if (variable == nullptr || *variable == '\0') return FinetuneForm::automatic;
  const std::string name = variable;
  STD_TORCH_CHECK(name == "span" || name == "direct",
                  "FEWSHOT_EXT_EPISODE_FINETUNE_FORM: expected span or direct, got ", name);
  return name == "span" ? FinetuneForm::span : FinetuneForm::direct;
}

// fewshot_ext/ops raises the errors that name arguments; these keep a direct call from reading foreign memory.
inline void check(const Tensor& support, const Tensor& target, const Tensor& query, const Tensor& weight,
                  const Tensor& order, int64_t batch_size) {
  STD_TORCH_CHECK(support.dim() == 3 && target.dim() == 2 && query.dim() == 3 && weight.dim() == 3 && order.dim() == 3,
                  "expected support [E, S, D], support_target [E, S], query [E, Q, D], weight [E, way, D], order "
                  "[E, steps, S]");
  const int64_t episodes = support.size(0), size = support.size(1), dimensions = support.size(2);
  STD_TORCH_CHECK(target.size(0) == episodes && target.size(1) == size && query.size(0) == episodes &&
                      query.size(2) == dimensions && weight.size(0) == episodes && weight.size(2) == dimensions &&
                      order.size(0) == episodes && order.size(2) == size,
                  "support, support_target, query, weight and order do not fit together");
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(size >= 1 && size <= most && dimensions >= 1 && weight.size(1) >= 2 && weight.size(1) <= most,
                  "expected at least one support image, one dimension and two classes");
  STD_TORCH_CHECK(batch_size >= 1, "batch_size: expected at least 1, got ", batch_size);
  for (const Tensor* other : {&target, &query, &weight, &order})
    STD_TORCH_CHECK(other->device() == support.device(),
                    "support, support_target, query, weight and order are on different devices");
  STD_TORCH_CHECK(query.scalar_type() == support.scalar_type(), "support and query differ in dtype");
  STD_TORCH_CHECK(weight.scalar_type() == accumulate_type(support), "weight: expected the accumulation dtype");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && order.scalar_type() == ScalarType::Long,
                  "support_target and order: expected int64");
}

// Kernels read rows of neighboring elements, whatever the distance between rows.
inline Tensor with_dense_rows(const Tensor& rows) {
  return rows.size(2) <= 1 || rows.stride(2) == 1 ? rows : make_contiguous(rows);
}

template <class Kernels, class Storage>
void run(const Tensor& support, const Tensor& target, const Tensor& query, const Tensor& weight, const Tensor& order,
         const FinetuneSettings& settings, Tensor& scores) {
  using Accumulate = std::conditional_t<std::is_same_v<Storage, double>, double, float>;
  EpisodeFinetuneProblem<Storage, Accumulate> problem;
  problem.episodes = support.size(0);
  problem.support_size = support.size(1);
  problem.query_size = query.size(1);
  problem.dimensions = support.size(2);
  problem.way = weight.size(1);
  problem.passes = order.size(1);
  problem.settings = settings;
  problem.support = static_cast<const Storage*>(support.const_data_ptr());
  problem.query = static_cast<const Storage*>(query.const_data_ptr());
  for (int k = 0; k < 2; ++k) {
    problem.support_strides[k] = support.stride(k);
    problem.query_strides[k] = query.stride(k);
  }
  problem.target = static_cast<const int64_t*>(target.const_data_ptr());
  problem.weight = static_cast<const Accumulate*>(weight.const_data_ptr());
  problem.order = static_cast<const int64_t*>(order.const_data_ptr());
  problem.scores = static_cast<Accumulate*>(scores.mutable_data_ptr());
  Kernels::run(problem, support);
}

// `Kernels::run(problem, support)` trains and scores all episodes on the device of `support`.
template <class Kernels>
Tensor finetune(Tensor support, Tensor target, Tensor query, Tensor weight, Tensor order, bool cosine, double scale,
                double margin, int64_t batch_size, double lr, double momentum, double dampening, double weight_decay) {
  check(support, target, query, weight, order, batch_size);
  support = with_dense_rows(support);
  query = with_dense_rows(query);
  target = make_contiguous(target);
  weight = make_contiguous(weight);
  order = make_contiguous(order);
  // Kernels round up the minibatches of a pass, which a batch size near 2^63 would overflow.
  batch_size = std::min(batch_size, support.size(1));
  const FinetuneSettings settings{cosine, scale, margin, batch_size, lr, momentum, dampening, weight_decay};
  Tensor scores = new_empty(support, {support.size(0), query.size(1), weight.size(1)}, accumulate_type(support));
  if (support.size(0) == 0) return scores;
  switch (support.scalar_type()) {
    case ScalarType::Float:
      run<Kernels, float>(support, target, query, weight, order, settings, scores);
      break;
    case ScalarType::Double:
      run<Kernels, double>(support, target, query, weight, order, settings, scores);
      break;
    case ScalarType::BFloat16:
      run<Kernels, BFloat16>(support, target, query, weight, order, settings, scores);
      break;
    case ScalarType::Half:
      run<Kernels, Float16>(support, target, query, weight, order, settings, scores);
      break;
    default:
      STD_TORCH_CHECK(false, "support: expected float32, float64, bfloat16 or float16");
  }
  return scores;
}

// `Kernels::draw<T>(draws, support)` fills the results in on the device of `support`. The seed is on the CPU, for it
// comes from a generator there, and no device has to be waited for.
template <class Kernels>
std::tuple<Tensor, Tensor> draw(Tensor support, Tensor seed, int64_t way, int64_t passes) {
  STD_TORCH_CHECK(support.dim() == 3 && way >= 0 && passes >= 0, "expected support [E, S, D], way and steps");
  STD_TORCH_CHECK(seed.numel() == 1 && seed.is_cpu() && seed.scalar_type() == ScalarType::Long,
                  "seed: expected one int64 on the CPU");
  EpisodeDraws draws;
  draws.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  draws.episodes = support.size(0);
  draws.way = way;
  draws.dimensions = support.size(2);
  draws.passes = passes;
  draws.support_size = support.size(1);
  const ScalarType accumulate = accumulate_type(support);
  Tensor weight = new_empty(support, {draws.episodes, way, draws.dimensions}, accumulate);
  Tensor order = new_empty(support, {draws.episodes, passes, draws.support_size}, ScalarType::Long);
  draws.weight = weight.mutable_data_ptr();
  draws.order = static_cast<int64_t*>(order.mutable_data_ptr());
  if (draws.episodes > 0) {
    if (accumulate == ScalarType::Double)
      Kernels::template draw<double>(draws, support);
    else
      Kernels::template draw<float>(draws, support);
  }
  return {weight, order};
}

}  // namespace episode_finetune_tensors
}  // namespace fewshot_ext
