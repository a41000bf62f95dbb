// Binding of margin softmax for any device: tensors in, MarginSoftmaxProblem out, the device's kernels called.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <tuple>

#include "common/new_tensor.h"
#include "margin_softmax/problem.h"

namespace fewshot_ext {

namespace margin_softmax_tensors {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& features) {
  switch (features.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, "features: expected float32, float64, bfloat16 or float16");
  }
}

inline ScalarType accumulate_type(const Tensor& features) {
  return features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Kernels read rows of neighboring elements, whatever the distance between rows.
inline Tensor with_dense_rows(const Tensor& matrix) {
  return matrix.size(1) <= 1 || matrix.stride(1) == 1 ? matrix : make_contiguous(matrix);
}

// fewshot_ext/ops raises the errors that name arguments; these keep a direct call from reading foreign memory.
inline void check(const Tensor& features, const Tensor& weight, const Tensor& target, int64_t total_classes) {
  STD_TORCH_CHECK(features.dim() == 2 && weight.dim() == 2 && target.dim() == 1,
                  "expected features [N, D], weight [C, D], target [N]");
  STD_TORCH_CHECK(features.size(1) == weight.size(1) && features.size(0) == target.size(0),
                  "features, weight and target do not fit together");
  STD_TORCH_CHECK(features.device() == weight.device() && features.device() == target.device(),
                  "features, weight and target are on different devices");
  STD_TORCH_CHECK(features.scalar_type() == weight.scalar_type(), "features and weight differ in dtype");
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long, "target: expected int64");
  const int64_t classes = weight.size(0), most = int64_t(1) << 31;
  STD_TORCH_CHECK(classes < most && weight.size(1) >= 1 && (total_classes == 0 ? classes >= 2 : classes >= 1),
                  "weight: expected [C, D] with 2 <= C < 2^31 (or 1 <= C for a shard) and D >= 1");
  STD_TORCH_CHECK(total_classes == 0 || (total_classes >= 2 && total_classes >= classes && total_classes < most),
                  "total_classes: expected 0 or a number in [max(2, C), 2^31), got ", total_classes);
}

inline MarginSoftmaxProblem describe(const Tensor& features, const Tensor& weight, const Tensor& target, double margin,
                                     double scale, double label_smoothing, int64_t ignore_index, bool cosine,
                                     int64_t total_classes, bool allow_tf32) {
  MarginSoftmaxProblem problem;
  problem.samples = features.size(0);
  problem.classes = weight.size(0);
  problem.total_classes = total_classes == 0 ? problem.classes : total_classes;
  problem.dimensions = features.size(1);
  problem.dtype = dtype_of(features);
  problem.features = features.const_data_ptr();
  problem.features_stride = features.stride(0);
  problem.weight = weight.const_data_ptr();
  problem.weight_stride = weight.stride(0);
  problem.target = static_cast<const int64_t*>(target.const_data_ptr());
  problem.margin = margin;
  problem.scale = scale;
  problem.label_smoothing = label_smoothing;
  problem.ignore_index = ignore_index;
  problem.cosine = cosine;
  problem.allow_tf32 = allow_tf32;
  return problem;
}

// A gradient of `like`'s shape, zero where there is no sample to give one; an empty tensor where nobody asked.
inline Tensor gradient(const Tensor& like, bool wanted, bool zero) {
  if (!wanted) return new_empty(like, {0}, like.scalar_type());
  const int64_t shape[] = {like.size(0), like.size(1)};
  return zero ? make_zeros(like, shape, like.scalar_type()) : new_empty(like, shape, like.scalar_type());
}

// `Kernels::run(problem, features)` computes what the problem asks for, on the device of `features`. The backward pass
// is the one with an upstream gradient.
template <class Kernels>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor features, Tensor weight, Tensor target, double margin,
                                                           double scale, double label_smoothing, int64_t ignore_index,
                                                           bool cosine, int64_t total_classes, int64_t reduction,
                                                           bool features_grad, bool weight_grad, bool return_prediction,
                                                           bool allow_tf32) {
  check(features, weight, target, total_classes);
  features = with_dense_rows(features);
  weight = with_dense_rows(weight);
  target = make_contiguous(target);
  MarginSoftmaxProblem problem = describe(features, weight, target, margin, scale, label_smoothing, ignore_index,
                                          cosine, total_classes, allow_tf32);
  STD_TORCH_CHECK(reduction >= 0 && reduction <= 2, "reduction: expected 0, 1 or 2, got ", reduction);
  problem.reduction = static_cast<Reduction>(reduction);
  const bool none = problem.reduction == Reduction::none;
  STD_TORCH_CHECK(!none || (!features_grad && !weight_grad),
                  "gradients come with the forward pass only where the loss is a scalar");

  const ScalarType accumulate = accumulate_type(features);
  const int64_t samples = problem.samples;
  const bool empty = samples == 0;
  Tensor loss = none    ? new_empty(features, {samples}, accumulate)
                : empty ? make_zeros(features, {}, accumulate)
                        : new_empty(features, nullptr, 0, accumulate);
  Tensor prediction = new_empty(features, {return_prediction ? samples : 0}, ScalarType::Long);
  Tensor statistics = new_empty(features, {4, samples}, accumulate);
  Tensor grad_features = gradient(features, features_grad, empty);
  Tensor grad_weight = gradient(weight, weight_grad, empty);
  if (!empty) {
    problem.loss = loss.mutable_data_ptr();
    problem.row_statistics = statistics.mutable_data_ptr();
    if (return_prediction) problem.prediction = static_cast<int64_t*>(prediction.mutable_data_ptr());
    if (features_grad) problem.grad_features = grad_features.mutable_data_ptr();
    if (weight_grad) problem.grad_weight = grad_weight.mutable_data_ptr();
    Kernels::run(problem, features);
  }
  return {loss, prediction, statistics, grad_features, grad_weight};
}

template <class Kernels>
std::tuple<Tensor, Tensor> backward(Tensor grad_loss, Tensor features, Tensor weight, Tensor target,
                                    Tensor row_statistics, double margin, double scale, double label_smoothing,
                                    int64_t ignore_index, bool cosine, int64_t total_classes, bool features_grad,
                                    bool weight_grad, bool allow_tf32) {
  check(features, weight, target, total_classes);
  const ScalarType accumulate = accumulate_type(features);
  STD_TORCH_CHECK(
      grad_loss.dim() == 1 && grad_loss.size(0) == features.size(0) && grad_loss.scalar_type() == accumulate,
      "grad_loss: expected [N] in the accumulation dtype");
  STD_TORCH_CHECK(row_statistics.dim() == 2 && row_statistics.size(0) == 4 &&
                      row_statistics.size(1) == features.size(0) && row_statistics.scalar_type() == accumulate,
                  "row_statistics: expected [4, N] as the forward pass returned it");
  STD_TORCH_CHECK(grad_loss.device() == features.device() && row_statistics.device() == features.device(),
                  "features, grad_loss and row_statistics are on different devices");
  features = with_dense_rows(features);
  weight = with_dense_rows(weight);
  target = make_contiguous(target);
  grad_loss = make_contiguous(grad_loss);
  row_statistics = make_contiguous(row_statistics);
  MarginSoftmaxProblem problem = describe(features, weight, target, margin, scale, label_smoothing, ignore_index,
                                          cosine, total_classes, allow_tf32);
  const bool empty = problem.samples == 0;
  Tensor grad_features = gradient(features, features_grad, empty);
  Tensor grad_weight = gradient(weight, weight_grad, empty);
  if (!empty) {
    problem.grad_loss = grad_loss.const_data_ptr();
    problem.row_statistics = row_statistics.mutable_data_ptr();
    if (features_grad) problem.grad_features = grad_features.mutable_data_ptr();
    if (weight_grad) problem.grad_weight = grad_weight.mutable_data_ptr();
    Kernels::run(problem, features);
  }
  return {grad_features, grad_weight};
}

}  // namespace margin_softmax_tensors
}  // namespace fewshot_ext
