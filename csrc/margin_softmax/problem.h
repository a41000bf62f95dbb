// Margin softmax, described without torch: what the binding fills in and every kernel reads.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fewshot_ext {

enum class Reduction : int { none = 0, mean = 1, sum = 2 };

// One call. `Accumulate` below is double for float64 inputs and float for every other dtype.
struct MarginSoftmaxProblem {
  int64_t samples = 0;  // N
  int64_t classes = 0;  // C
  // Where the weight is one of several shards: the classes of all of them. Labels from C on then lie in another shard,
  // and the row's loss is the caller's to form, from the statistics of all shards.
  int64_t total_classes = 0;
  int64_t dimensions = 0;  // D

  Dtype dtype = Dtype::float32;    // of features, weight and their gradients
  const void* features = nullptr;  // [N, D], rows features_stride elements apart
  int64_t features_stride = 0;
  const void* weight = nullptr;  // [C, D], rows weight_stride elements apart
  int64_t weight_stride = 0;
  const int64_t* target = nullptr;  // [N]

  double margin = 0;
  double scale = 1;
  double label_smoothing = 0;
  int64_t ignore_index = -100;
  bool cosine = true;       // inner product otherwise
  bool allow_tf32 = false;  // factors of float32 may be rounded to it where that is faster
  Reduction reduction = Reduction::mean;

  // Results; a null pointer is a result nobody asked for.
  void* loss = nullptr;           // Accumulate, [] or [N]
  int64_t* prediction = nullptr;  // [N]
  // Accumulate [4, N]: the log-sum-exp over the classes other than the target; the target's margin-adjusted logit; the
  // sum of the logits without margin, where labels are smoothed; the largest of them, where predictions are wanted.
  // The forward pass writes it, the backward pass reads the first two, which have to be those of all shards.
  void* row_statistics = nullptr;
  void* grad_features = nullptr;  // [N, D], contiguous
  void* grad_weight = nullptr;    // [C, D], contiguous

  // Upstream gradient of each row's loss, Accumulate [N]; read by the backward pass alone.
  const void* grad_loss = nullptr;
};

}  // namespace fewshot_ext
