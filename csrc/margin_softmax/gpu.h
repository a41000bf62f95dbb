// The order of launches on a GPU, written against a Device so that the emulator runs the same code. A Device offers
//
//   launch<kernel>(grid, block, argument...)
//   launch_cooperative<kernel>(most_blocks, block, argument...)    as many blocks as fit, at most that many
//   multiply(out, a, b)                                            out = a b, in the accumulation type
//   allocate(bytes)                                                memory for the length of the call
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>

#include "common/matrix.h"
#include "common/memory.h"
#include "margin_softmax/chunked.cuh"
#include "margin_softmax/one_launch.cuh"

namespace fewshot_ext {

enum class MarginSoftmaxKernel { one_launch, chunked };

// How a call is carried out; the defaults suit GPUs, the tests set others to reach every branch on small problems.
struct MarginSoftmaxPlan {
  std::optional<MarginSoftmaxKernel> kernel;  // by size where nobody says
  int64_t chunk_samples = 4096;
  int64_t chunk_products = int64_t(1) << 22;  // 16 MiB in float32: a chunk stays in the L2 cache between kernels

  // One launch pays as long as the arithmetic, in plain multiply-adds, costs less than cuBLAS's launches. Where that
  // ends is reckoned, not measured: 2^27 multiply-adds take three times over about as long as ten launches.
  static bool is_small(const MarginSoftmaxProblem& p) {
    return p.samples <= 2048 && p.classes <= 2048 && p.samples * p.classes * p.dimensions <= int64_t(1) << 27;
  }

  // 32-bit indices, and sums over the rows by one block.
  static bool fits_one_launch(const MarginSoftmaxProblem& p) {
    return p.samples <= 65536 && p.classes <= 65536 && p.samples * p.classes <= int64_t(1) << 26 &&
           p.dimensions <= int64_t(1) << 24;
  }

  MarginSoftmaxKernel choose(const MarginSoftmaxProblem& p) const {
    return kernel.value_or(is_small(p) ? MarginSoftmaxKernel::one_launch : MarginSoftmaxKernel::chunked);
  }
};

namespace gpu {

using Memory = Arena<std::byte>;

template <class T>
T* take(Memory& memory, int64_t count) {
  return reinterpret_cast<T*>(memory.take(count * static_cast<int64_t>(sizeof(T))));
}

inline unsigned blocks_for(int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

template <class Storage, class Device>
void one_launch(Device& device, const MarginSoftmaxProblem& problem) {
  using T = Accumulate<Storage>;
  OneLaunch<Storage> p{};
  p.rows = Rows<T>::of(problem);
  p.features = static_cast<const Storage*>(problem.features);
  p.features_stride = problem.features_stride;
  p.weight = static_cast<const Storage*>(problem.weight);
  p.weight_stride = problem.weight_stride;
  p.samples = static_cast<int>(problem.samples);
  p.classes = static_cast<int>(problem.classes);
  p.dimensions = static_cast<int>(problem.dimensions);
  p.cosine = problem.cosine;
  p.features_in_fours = in_fours<Storage>(p.features, p.features_stride, p.dimensions);
  p.weight_in_fours = in_fours<Storage>(p.weight, p.weight_stride, p.dimensions);
  p.grad_features = static_cast<Storage*>(problem.grad_features);
  p.grad_weight = static_cast<Storage*>(problem.grad_weight);
  const auto lay_out = [&p](Memory memory) {
    p.logits = take<T>(memory, int64_t(p.samples) * p.classes);
    p.inverse_features = take<T>(memory, p.samples);
    p.inverse_weight = take<T>(memory, p.classes);
    p.parts = take<PartOfRow<T>>(memory, int64_t(p.samples) * p.class_tiles());
    return memory.used;
  };
  lay_out({device.allocate(lay_out({}))});
  device.template launch_cooperative<margin_softmax_one_launch<Storage>>(std::max(p.logit_items(), p.gradient_items()),
                                                                         OneLaunch<Storage>::threads, p);
}

// Pass A goes through all products x_i . w_j for the rows' statistics, pass B once more for the gradients. The products
// of a chunk are computed again in pass B, unless there is only one chunk, or they can wait in the memory of the
// weight's gradient: N x C of them fit where N <= D, and each chunk lies where its own gradient will come.
template <class Storage, class Device>
class Chunked {
 public:
  using T = Accumulate<Storage>;
  static constexpr bool half = !std::is_same_v<Storage, T>;
  static constexpr bool normalized_operands = std::is_same_v<Storage, Float16>;

  Chunked(Device& device, const MarginSoftmaxProblem& problem, const MarginSoftmaxPlan& plan)
      : device_(device), problem_(problem), rows_(Rows<T>::of(problem)) {
    chunk_samples_ = std::min(problem.samples, plan.chunk_samples);
    chunk_classes_ = std::min(problem.classes, std::max<int64_t>(plan.chunk_products / chunk_samples_ / 64 * 64, 64));
    features_ = vectors(problem.features, problem.features_stride, problem.samples);
    weight_ = vectors(problem.weight, problem.weight_stride, problem.classes);
    one_chunk_ = chunk_samples_ == problem.samples && chunk_classes_ == problem.classes;
    backward_ = problem.grad_loss != nullptr;
    gradients_ = problem.grad_features != nullptr || problem.grad_weight != nullptr;
    kept_ = !half && !backward_ && gradients_ && !one_chunk_ && problem.grad_weight != nullptr &&
            chunk_samples_ == problem.samples && problem.samples <= problem.dimensions;
    lay_out({device.allocate(lay_out({}))});
  }

  void run() {
    inverse_norms(features_, 0, problem_.samples, inverse_features_, normalized_features_);
    for_each_chunk([this](const Chunk<T>& chunk) {
      if (chunk.first_sample == 0) inverse_norms(weight_, chunk.first_class, chunk.classes, inverse_weight_, nullptr);
      if (backward_) return;
      multiply_chunk(chunk);
      device_.template launch<margin_softmax_row_statistics<T>>(static_cast<unsigned>(chunk.samples), chunked::threads,
                                                                RowStatistics<T>{chunk, parts_, target_logits_});
    });
    device_.template launch<margin_softmax_finish_rows<T>>(
        1, 1024, FinishRows<T>{rows_, parts_, target_logits_, coefficients_, operand_scale_});
    if (gradients_) gradients();
  }

 private:
  struct Vectors {
    const Storage* data;
    int64_t stride, rows;
    bool fours;
  };

  Vectors vectors(const void* data, int64_t stride, int64_t rows) const {
    return {static_cast<const Storage*>(data), stride, rows, in_fours<Storage>(data, stride, problem_.dimensions)};
  }

  int64_t lay_out(Memory memory) {
    const int64_t samples = problem_.samples, dimensions = problem_.dimensions;
    const int64_t products = chunk_samples_ * chunk_classes_;
    inverse_features_ = take<T>(memory, samples);
    inverse_weight_ = take<T>(memory, problem_.classes);
    parts_ = take<PartOfRow<T>>(memory, backward_ ? 0 : samples);
    target_logits_ = take<T>(memory, backward_ ? 0 : samples);
    products_ = take<T>(memory, products);
    coefficients_ = nullptr;
    operand_scale_ = nullptr;
    normalized_features_ = normalized_weight_ = nullptr;
    if (!gradients_) return memory.used;

    coefficients_ = take<GradientCoefficients<T>>(memory, samples);
    // In the accumulation type the gradient takes the place of the logits, unless these lie in its result's memory.
    gradient_ = half || kept_ ? take<Storage>(memory, products) : reinterpret_cast<Storage*>(products_);
    if (normalized_operands) {
      operand_scale_ = take<T>(memory, 1);
      if (problem_.cosine) {
        normalized_features_ = take<Storage>(memory, samples * dimensions);
        normalized_weight_ = take<Storage>(memory, chunk_classes_ * dimensions);
      }
    }
    const bool several_samples = chunk_samples_ < samples, several_classes = chunk_classes_ < problem_.classes;
    if (problem_.grad_features != nullptr) {
      raw_features_ = half ? take<T>(memory, samples * dimensions) : static_cast<T*>(problem_.grad_features);
      part_features_ = several_classes ? take<T>(memory, chunk_samples_ * dimensions) : nullptr;
    }
    if (problem_.grad_weight != nullptr) {
      raw_weight_ = half ? take<T>(memory, chunk_classes_ * dimensions) : nullptr;
      part_weight_ = several_samples ? take<T>(memory, chunk_classes_ * dimensions) : nullptr;
    }
    return memory.used;
  }

  // Classes outermost: a chunk of the weight, the larger of the two as a rule, is read from memory once a pass.
  template <class Visit>
  void for_each_chunk(Visit visit) {
    for (int64_t j = 0; j < problem_.classes; j += chunk_classes_) {
      for (int64_t i = 0; i < problem_.samples; i += chunk_samples_) {
        const int64_t classes = std::min(chunk_classes_, problem_.classes - j);
        T* products = kept_ ? static_cast<T*>(problem_.grad_weight) + j * problem_.dimensions : products_;
        visit(Chunk<T>{rows_, products, i, std::min(chunk_samples_, problem_.samples - i), j, classes,
                       inverse_features_, inverse_weight_});
      }
    }
  }

  void inverse_norms(const Vectors& vectors, int64_t first, int64_t count, T* inverse, Storage* normalized) {
    device_.template launch<margin_softmax_inverse_norms<Storage>>(
        blocks_for(count, chunked::warps), chunked::threads,
        InverseNorms<Storage>{vectors.data + first * vectors.stride, vectors.stride, count, problem_.dimensions,
                              problem_.cosine, vectors.fours, inverse + first, normalized});
  }

  Matrix<const Storage> rows_of(const Vectors& vectors, int64_t first, int64_t count) const {
    return {vectors.data + first * vectors.stride, count, problem_.dimensions, vectors.stride, 1};
  }

  template <class Element>
  Matrix<Element> dense(Element* data, int64_t rows, int64_t columns) const {
    return {data, rows, columns, columns, 1};
  }

  void multiply_chunk(const Chunk<T>& chunk) {
    device_.multiply(dense(chunk.products, chunk.samples, chunk.classes),
                     rows_of(features_, chunk.first_sample, chunk.samples),
                     rows_of(weight_, chunk.first_class, chunk.classes).transposed());
  }

  // sum (+)= a b.
  void multiply_into(T* sum, bool add, T* part, const Matrix<const Storage>& a, const Matrix<const Storage>& b) {
    device_.multiply(dense(add ? part : sum, a.rows, b.columns), a, b);
    const int64_t count = a.rows * b.columns;
    if (add)
      device_.template launch<margin_softmax_accumulate<T>>(blocks_for(count, chunked::threads), chunked::threads, sum,
                                                            static_cast<const T*>(part), count);
  }

  void gradients() {
    const int64_t dimensions = problem_.dimensions;
    for_each_chunk([&](const Chunk<T>& chunk) {
      if (backward_ || !(one_chunk_ || kept_)) multiply_chunk(chunk);
      device_.template launch<margin_softmax_gradient<T, Storage>>(
          dim3(blocks_for(chunk.classes, 4 * chunked::threads), static_cast<unsigned>(chunk.samples)), chunked::threads,
          SoftmaxGradient<T, Storage>{chunk, coefficients_, operand_scale_, gradient_});
      const Matrix<const Storage> gradient = dense<const Storage>(gradient_, chunk.samples, chunk.classes);

      if (problem_.grad_weight != nullptr) {
        Storage* result = static_cast<Storage*>(problem_.grad_weight) + chunk.first_class * dimensions;
        T* raw = half ? raw_weight_ : reinterpret_cast<T*>(result);
        const Matrix<const Storage> features =
            normalized_features_ != nullptr
                ? dense<const Storage>(normalized_features_ + chunk.first_sample * dimensions, chunk.samples,
                                       dimensions)
                : rows_of(features_, chunk.first_sample, chunk.samples);
        multiply_into(raw, chunk.first_sample > 0, part_weight_, gradient.transposed(), features);
        if (chunk.first_sample + chunk.samples == problem_.samples)
          project(raw, weight_, chunk.first_class, chunk.classes, inverse_weight_, result);
      }
      if (problem_.grad_features != nullptr) {
        if (normalized_weight_ != nullptr && chunk.first_sample == 0)
          inverse_norms(weight_, chunk.first_class, chunk.classes, inverse_weight_, normalized_weight_);
        const Matrix<const Storage> weight = normalized_weight_ != nullptr
                                                 ? dense<const Storage>(normalized_weight_, chunk.classes, dimensions)
                                                 : rows_of(weight_, chunk.first_class, chunk.classes);
        multiply_into(raw_features_ + chunk.first_sample * dimensions, chunk.first_class > 0, part_features_, gradient,
                      weight);
      }
    });
    if (problem_.grad_features != nullptr)
      project(raw_features_, features_, 0, problem_.samples, inverse_features_,
              static_cast<Storage*>(problem_.grad_features));
  }

  void project(const T* raw, const Vectors& vectors, int64_t first, int64_t count, const T* inverse, Storage* result) {
    device_.template launch<margin_softmax_project<Storage>>(
        blocks_for(count, chunked::warps), chunked::threads,
        ProjectGradient<Storage>{raw, vectors.data + first * vectors.stride, vectors.stride, count, problem_.dimensions,
                                 inverse + first, operand_scale_, problem_.cosine, vectors.fours, result});
  }

  Device& device_;
  const MarginSoftmaxProblem& problem_;
  Rows<T> rows_;
  Vectors features_, weight_;
  int64_t chunk_samples_, chunk_classes_;
  bool one_chunk_, backward_, gradients_;
  bool kept_;  // the products wait in the weight's gradient

  T *inverse_features_, *inverse_weight_;
  PartOfRow<T>* parts_;
  T *target_logits_, *products_;
  GradientCoefficients<T>* coefficients_;
  Storage* gradient_ = nullptr;
  T* operand_scale_;
  Storage *normalized_features_, *normalized_weight_;
  T *raw_features_ = nullptr, *part_features_ = nullptr;
  T *raw_weight_ = nullptr, *part_weight_ = nullptr;
};

template <class Storage, class Device>
void margin_softmax(Device& device, const MarginSoftmaxProblem& problem, const MarginSoftmaxPlan& plan) {
  if (plan.choose(problem) == MarginSoftmaxKernel::one_launch)
    one_launch<Storage>(device, problem);
  else
    Chunked<Storage, Device>(device, problem, plan).run();
}

}  // namespace gpu

template <class Device>
void margin_softmax_on_gpu(Device& device, const MarginSoftmaxProblem& problem, const MarginSoftmaxPlan& plan) {
  switch (problem.dtype) {
    case Dtype::float32:
      return gpu::margin_softmax<float>(device, problem, plan);
    case Dtype::float64:
      return gpu::margin_softmax<double>(device, problem, plan);
    case Dtype::bfloat16:
      return gpu::margin_softmax<BFloat16>(device, problem, plan);
    case Dtype::float16:
      return gpu::margin_softmax<Float16>(device, problem, plan);
  }
}

}  // namespace fewshot_ext
