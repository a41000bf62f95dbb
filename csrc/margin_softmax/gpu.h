// The order of launches on a GPU, written against a Device so that the emulator runs the same code. A Device offers
//
//   launch<kernel>(grid, block, argument...)
//   launch_with_shared<kernel>(grid, block, bytes, argument...)    with so much dynamic shared memory
//   launch_cooperative<kernel>(most_blocks, block, argument...)    as many blocks as fit, at most that many
//   multiply(out, a, b)                                            out = a b, in the accumulation type
//   multiply_add(out, a, b)                                        out += a b, all in the accumulation type
//   allocate(bytes)                                                memory for the length of the call
#pragma once

#include <algorithm>
#include <cstddef>

#include "common/matrix.h"
#include "common/memory.h"
#include "margin_softmax/chunked.cuh"
#include "margin_softmax/one_launch.cuh"
#include "margin_softmax/one_pass.cuh"
#include "margin_softmax/plan.h"

namespace fewshot_ext {

namespace gpu {

using Memory = Arena<std::byte>;

template <class T>
T* take(Memory& memory, int64_t count) {
  return reinterpret_cast<T*>(memory.take(count * static_cast<int64_t>(sizeof(T))));
}

inline unsigned blocks_for(int64_t items, int64_t each) { return static_cast<unsigned>((items + each - 1) / each); }

template <class Storage, class Device>
void few_classes(Device& device, const MarginSoftmaxProblem& problem) {
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
  p.slice();
  p.pitch = (p.classes + 3) / 4 * 4;
  const auto lay_out = [&p](Memory memory) {
    p.products = take<T>(memory, int64_t(p.slices) * p.samples * p.pitch);
    p.inverse_features = take<T>(memory, p.samples);
    p.inverse_weight = take<T>(memory, p.pitch);
    p.counted = take<T>(memory, 1);
    p.losses = take<T>(memory, p.samples);
    p.dots = take<T>(memory, p.gradients() ? p.samples : 0);
    p.terms = take<T>(memory, p.gradients() ? int64_t(p.samples) * p.pitch : 0);
    return memory.used;
  };
  lay_out({device.allocate(lay_out({}))});
  const int most_blocks = std::max(p.first_items(), p.last_items());
  if (std::is_same_v<Storage, float> && problem.allow_tf32)
    device.template launch_cooperative<margin_softmax_one_launch<Storage, std::is_same_v<Storage, float>>>(
        most_blocks, one_launch::threads, p);
  else
    device.template launch_cooperative<margin_softmax_one_launch<Storage, false>>(most_blocks, one_launch::threads, p);
}

// What both ways to many classes are made of.
template <class Storage, class Device>
class ManyClasses {
 public:
  using T = Accumulate<Storage>;
  static constexpr bool half = !std::is_same_v<Storage, T>;
  static constexpr bool normalized_operands = std::is_same_v<Storage, Float16>;

 protected:
  struct Vectors {
    const Storage* data;
    int64_t stride, rows;
    bool fours;
  };

  ManyClasses(Device& device, const MarginSoftmaxProblem& problem)
      : device_(device),
        problem_(problem),
        rows_(Rows<T>::of(problem)),
        features_(vectors(problem.features, problem.features_stride, problem.samples)),
        weight_(vectors(problem.weight, problem.weight_stride, problem.classes)),
        backward_(problem.grad_loss != nullptr),
        gradients_(problem.grad_features != nullptr || problem.grad_weight != nullptr) {}

  Vectors vectors(const void* data, int64_t stride, int64_t rows) const {
    return {static_cast<const Storage*>(data), stride, rows, in_fours<Storage>(data, stride, problem_.dimensions)};
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

  // The factor of the weight's gradient that belongs to the samples.
  Matrix<const Storage> features_operand(int64_t first, int64_t count) const {
    if (normalized_features_ == nullptr) return rows_of(features_, first, count);
    return dense<const Storage>(normalized_features_ + first * problem_.dimensions, count, problem_.dimensions);
  }

  // sum += part.
  void accumulate(T* sum, const T* part, int64_t count) {
    device_.template launch<margin_softmax_accumulate<T>>(blocks_for(count, chunked::threads), chunked::threads, sum,
                                                          part, count);
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
  bool backward_, gradients_;

  T *inverse_features_ = nullptr, *inverse_weight_ = nullptr, *products_ = nullptr;
  T* operand_scale_ = nullptr;
  Storage *normalized_features_ = nullptr, *normalized_weight_ = nullptr;
  T *raw_features_ = nullptr, *raw_weight_ = nullptr;
};

// Complete rows of products, a chunk of samples at a time: each is computed once, and a kernel turns it into the loss
// and in place into the gradient.
template <class Storage, class Device>
class OnePass : ManyClasses<Storage, Device> {
  using Base = ManyClasses<Storage, Device>;
  using Base::half, Base::normalized_operands, Base::device_, Base::problem_, Base::rows_, Base::features_,
      Base::weight_, Base::backward_, Base::gradients_, Base::inverse_features_, Base::inverse_weight_, Base::products_,
      Base::operand_scale_, Base::normalized_features_, Base::normalized_weight_, Base::raw_features_,
      Base::raw_weight_;
  using typename Base::T;

 public:
  OnePass(Device& device, const MarginSoftmaxProblem& problem, const MarginSoftmaxPlan& plan) : Base(device, problem) {
    pitch_ = one_pass::pitch_of(problem.classes);
    const int64_t fit = std::max<int64_t>(plan.complete_rows(problem), 1);
    part_classes_ = std::max<int64_t>(fit * pitch_ / problem.dimensions / 32 * 32, 32);
    const int64_t chunks = blocks_for(problem.samples, fit);
    chunk_samples_ = blocks_for(problem.samples, chunks);  // all about equal
    lay_out({device.allocate(lay_out({}))});
  }

  void run() {
    if (!backward_ || operand_scale_ != nullptr)
      device_.template launch<margin_softmax_prepare<T>>(1, 1024, Prepare<T>{rows_, row_weight_, operand_scale_});
    this->inverse_norms(features_, 0, problem_.samples, inverse_features_, normalized_features_);
    this->inverse_norms(weight_, 0, problem_.classes, inverse_weight_, normalized_weight_);
    for (int64_t first = 0; first < problem_.samples; first += chunk_samples_)
      chunk(first, std::min(chunk_samples_, problem_.samples - first));
    if (problem_.grad_features != nullptr)
      this->project(raw_features_, features_, 0, problem_.samples, inverse_features_,
                    static_cast<Storage*>(problem_.grad_features));
    if (problem_.grad_weight != nullptr)
      this->project(raw_weight_, weight_, 0, problem_.classes, inverse_weight_,
                    static_cast<Storage*>(problem_.grad_weight));
    if (!backward_ && rows_.reduction != Reduction::none)
      device_.template launch<margin_softmax_total_loss<T>>(
          1, 1024, TotalLoss<T>{losses_, problem_.samples, row_weight_, rows_.loss});
  }

 private:
  int64_t lay_out(Memory memory) {
    const int64_t samples = problem_.samples, classes = problem_.classes, dimensions = problem_.dimensions;
    inverse_features_ = take<T>(memory, samples);
    inverse_weight_ = take<T>(memory, pitch_);
    products_ = take<T>(memory, chunk_samples_ * pitch_);
    row_weight_ = backward_ ? nullptr : take<T>(memory, 1);
    losses_ = backward_ ? nullptr : take<T>(memory, samples);
    if (!gradients_) return memory.used;

    if (normalized_operands) {
      operand_scale_ = take<T>(memory, 1);
      if (problem_.cosine && problem_.grad_weight != nullptr)
        normalized_features_ = take<Storage>(memory, samples * dimensions);
      if (problem_.cosine && problem_.grad_features != nullptr)
        normalized_weight_ = take<Storage>(memory, classes * dimensions);
    }
    if (problem_.grad_features != nullptr)
      raw_features_ = half ? take<T>(memory, samples * dimensions) : static_cast<T*>(problem_.grad_features);
    if (problem_.grad_weight != nullptr) {
      raw_weight_ = half ? take<T>(memory, classes * dimensions) : static_cast<T*>(problem_.grad_weight);
      part_weight_ = half && chunk_samples_ < samples ? take<T>(memory, part_classes_ * dimensions) : nullptr;
    }
    return memory.used;
  }

  void chunk(int64_t first, int64_t count) {
    const int64_t classes = problem_.classes, dimensions = problem_.dimensions;
    device_.multiply(Matrix<T>{products_, count, classes, pitch_, 1}, this->rows_of(features_, first, count),
                     this->rows_of(weight_, 0, classes).transposed());
    const CompleteRows<Storage> rows{rows_,           first,       products_,      pitch_,     inverse_features_,
                                     inverse_weight_, row_weight_, operand_scale_, gradients_, losses_};
    if (backward_)
      launch<true, false, false>(count, rows);
    else if (rows_.smoothing != 0 || std::is_same_v<T, double>)  // rare: not worth kernels of their own
      launch<false, true, true>(count, rows);
    else if constexpr (std::is_same_v<T, float>)
      rows_.prediction != nullptr ? launch<false, false, true>(count, rows) : launch<false, false, false>(count, rows);

    const Matrix<const Storage> gradient{reinterpret_cast<const Storage*>(products_), count, classes,
                                         pitch_ * static_cast<int64_t>(sizeof(T) / sizeof(Storage)), 1};
    if (problem_.grad_features != nullptr) {
      const Matrix<const Storage> weight =
          normalized_weight_ != nullptr ? this->template dense<const Storage>(normalized_weight_, classes, dimensions)
                                        : this->rows_of(weight_, 0, classes);
      device_.multiply(this->dense(raw_features_ + first * dimensions, count, dimensions), gradient, weight);
    }
    if (problem_.grad_weight == nullptr) return;
    const Matrix<const Storage> features = this->features_operand(first, count);
    if (first == 0)
      device_.multiply(this->dense(raw_weight_, classes, dimensions), gradient.transposed(), features);
    else if constexpr (half)
      add_to_weight(gradient, features);
    else
      device_.multiply_add(this->dense(raw_weight_, classes, dimensions), gradient.transposed(), features);
  }

  // torch has no product of half types that adds to float32.
  void add_to_weight(const Matrix<const Storage>& gradient, const Matrix<const Storage>& features) {
    for (int64_t j = 0; j < problem_.classes; j += part_classes_) {
      const int64_t classes = std::min(part_classes_, problem_.classes - j);
      Matrix<const Storage> columns{gradient.data + j, gradient.rows, classes, gradient.row_stride, 1};
      device_.multiply(this->dense(part_weight_, classes, features.columns), columns.transposed(), features);
      this->accumulate(raw_weight_ + j * features.columns, part_weight_, classes * features.columns);
    }
  }

  template <bool backward, bool smoothing, bool prediction>
  void launch(int64_t count, const CompleteRows<Storage>& rows) {
    const unsigned blocks = static_cast<unsigned>(count);
    if (problem_.classes <= one_pass::most_of_short_row)
      device_.template launch<margin_softmax_one_pass<Storage, one_pass::short_row, backward, smoothing, prediction>>(
          blocks, one_pass::short_row, rows);
    else
      device_.template launch<margin_softmax_one_pass<Storage, one_pass::long_row, backward, smoothing, prediction>>(
          blocks, one_pass::long_row, rows);
  }

  int64_t pitch_, chunk_samples_, part_classes_;
  T *row_weight_, *losses_, *part_weight_ = nullptr;
};

// Pass A goes through all products x_i . w_j for the rows' statistics, pass B once more for the gradients. The products
// of a chunk are computed again in pass B, unless they can wait in the memory of the weight's gradient: N x C of them
// fit where N <= D, and each chunk lies where its own gradient will come.
template <class Storage, class Device>
class Chunked : ManyClasses<Storage, Device> {
  using Base = ManyClasses<Storage, Device>;
  using Base::half, Base::normalized_operands, Base::device_, Base::problem_, Base::rows_, Base::features_,
      Base::weight_, Base::backward_, Base::gradients_, Base::inverse_features_, Base::inverse_weight_, Base::products_,
      Base::operand_scale_, Base::normalized_features_, Base::normalized_weight_, Base::raw_features_,
      Base::raw_weight_;
  using typename Base::T;

 public:
  Chunked(Device& device, const MarginSoftmaxProblem& problem, const MarginSoftmaxPlan& plan) : Base(device, problem) {
    chunk_samples_ = std::min(problem.samples, plan.chunk_samples);
    chunk_classes_ = std::min(problem.classes, std::max<int64_t>(plan.chunk_products / chunk_samples_ / 64 * 64, 64));
    kept_ = !half && !backward_ && gradients_ && problem.grad_weight != nullptr && chunk_samples_ == problem.samples &&
            problem.samples <= problem.dimensions;
    lay_out({device.allocate(lay_out({}))});
  }

  void run() {
    this->inverse_norms(features_, 0, problem_.samples, inverse_features_, normalized_features_);
    for_each_chunk([this](const Chunk<T>& chunk) {
      if (chunk.first_sample == 0)
        this->inverse_norms(weight_, chunk.first_class, chunk.classes, inverse_weight_, nullptr);
      if (backward_) return;
      multiply_chunk(chunk);
      device_.template launch<margin_softmax_row_statistics<T>>(static_cast<unsigned>(chunk.samples),
                                                                chunked::threads_for(chunk.classes),
                                                                RowStatistics<T>{chunk, parts_, target_logits_});
    });
    device_.template launch<margin_softmax_finish_rows<T>>(
        1, 1024, FinishRows<T>{rows_, parts_, target_logits_, coefficients_, operand_scale_});
    if (gradients_) gradients();
  }

 private:
  int64_t lay_out(Memory memory) {
    const int64_t samples = problem_.samples, dimensions = problem_.dimensions;
    const int64_t products = chunk_samples_ * chunk_classes_;
    inverse_features_ = take<T>(memory, samples);
    inverse_weight_ = take<T>(memory, problem_.classes);
    parts_ = take<PartOfRow<T>>(memory, backward_ ? 0 : samples);
    target_logits_ = take<T>(memory, backward_ ? 0 : samples);
    products_ = take<T>(memory, products);
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

  void multiply_chunk(const Chunk<T>& chunk) {
    device_.multiply(this->dense(chunk.products, chunk.samples, chunk.classes),
                     this->rows_of(features_, chunk.first_sample, chunk.samples),
                     this->rows_of(weight_, chunk.first_class, chunk.classes).transposed());
  }

  // sum (+)= a b.
  void multiply_into(T* sum, bool add, T* part, const Matrix<const Storage>& a, const Matrix<const Storage>& b) {
    device_.multiply(this->dense(add ? part : sum, a.rows, b.columns), a, b);
    if (add) this->accumulate(sum, part, a.rows * b.columns);
  }

  void gradients() {
    const int64_t dimensions = problem_.dimensions;
    for_each_chunk([&](const Chunk<T>& chunk) {
      if (!kept_) multiply_chunk(chunk);
      const unsigned threads = chunked::threads_for(chunk.classes);
      device_.template launch<margin_softmax_gradient<T, Storage>>(
          dim3(blocks_for(chunk.classes, 4 * threads), static_cast<unsigned>(chunk.samples)), threads,
          SoftmaxGradient<T, Storage>{chunk, coefficients_, operand_scale_, gradient_});
      const Matrix<const Storage> gradient =
          this->template dense<const Storage>(gradient_, chunk.samples, chunk.classes);

      if (problem_.grad_weight != nullptr) {
        Storage* result = static_cast<Storage*>(problem_.grad_weight) + chunk.first_class * dimensions;
        T* raw = half ? raw_weight_ : reinterpret_cast<T*>(result);
        multiply_into(raw, chunk.first_sample > 0, part_weight_, gradient.transposed(),
                      this->features_operand(chunk.first_sample, chunk.samples));
        if (chunk.first_sample + chunk.samples == problem_.samples)
          this->project(raw, weight_, chunk.first_class, chunk.classes, inverse_weight_, result);
      }
      if (problem_.grad_features != nullptr) {
        if (normalized_weight_ != nullptr && chunk.first_sample == 0)
          this->inverse_norms(weight_, chunk.first_class, chunk.classes, inverse_weight_, normalized_weight_);
        const Matrix<const Storage> weight =
            normalized_weight_ != nullptr
                ? this->template dense<const Storage>(normalized_weight_, chunk.classes, dimensions)
                : this->rows_of(weight_, chunk.first_class, chunk.classes);
        multiply_into(raw_features_ + chunk.first_sample * dimensions, chunk.first_class > 0, part_features_, gradient,
                      weight);
      }
    });
    if (problem_.grad_features != nullptr)
      this->project(raw_features_, features_, 0, problem_.samples, inverse_features_,
                    static_cast<Storage*>(problem_.grad_features));
  }

  int64_t chunk_samples_, chunk_classes_;
  bool kept_;  // the products wait in the weight's gradient

  PartOfRow<T>* parts_;
  T* target_logits_;
  GradientCoefficients<T>* coefficients_ = nullptr;
  Storage* gradient_ = nullptr;
  T *part_features_ = nullptr, *part_weight_ = nullptr;
};

template <class Storage, class Device>
void margin_softmax(Device& device, const MarginSoftmaxProblem& problem, const MarginSoftmaxPlan& plan) {
  switch (plan.choose(problem)) {
    case MarginSoftmaxKernel::one_launch:
      return few_classes<Storage>(device, problem);
    case MarginSoftmaxKernel::one_pass:
      return OnePass<Storage, Device>(device, problem, plan).run();
    case MarginSoftmaxKernel::chunked:
      return Chunked<Storage, Device>(device, problem, plan).run();
  }
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
