// Fine-tuning of a linear classifier for each episode, described without torch: what the binding fills in and every
// kernel reads.
#pragma once

#include <cstdint>

#include "common/half.h"

namespace fewshot_ext {

constexpr double finetune_norm_floor = 1e-12;  // of torch.nn.functional.normalize

// How an episode is trained: by the products of its vectors, or by the vectors themselves.
enum class FinetuneForm : int { automatic, span, direct };

// velocity = kept * velocity + taken * gradient, and then weight -= lr * velocity.
struct SgdStep {
  double kept, taken;
};

// The loss, and the settings of torch.optim.SGD.
struct FinetuneSettings {
  bool cosine = true;  // inner product otherwise
  double scale = 1, margin = 0;
  int64_t batch_size = 1;
  double lr = 0, momentum = 0, dampening = 0, weight_decay = 0;

  // torch.optim.SGD takes the first gradient into the velocity whole, and without momentum has no dampening either.
  FEWSHOT_EXT_HOST_DEVICE SgdStep sgd_step(bool first) const {
    return first || momentum == 0 ? SgdStep{0, 1} : SgdStep{momentum, 1 - dampening};
  }
};

// Accumulate is double for float64 features and float for every other dtype. Strides count elements; the last dimension
// of every tensor is dense.
template <class Storage, class Accumulate>
struct EpisodeFinetuneProblem {
  int64_t episodes = 0;      // E
  int64_t support_size = 0;  // S
  int64_t query_size = 0;    // Q
  int64_t dimensions = 0;    // D
  int64_t way = 0;
  int64_t passes = 0;  // over the support set
  FinetuneSettings settings;

  const Storage* support = nullptr;  // [E, S, D]
  int64_t support_strides[2] = {};
  const Storage* query = nullptr;  // [E, Q, D]
  int64_t query_strides[2] = {};
  const int64_t* target = nullptr;     // [E, S]
  const Accumulate* weight = nullptr;  // [E, way, D]
  const int64_t* order = nullptr;      // [E, passes, S]
  Accumulate* scores = nullptr;        // [E, Q, way]
};

}  // namespace fewshot_ext
