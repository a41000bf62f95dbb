// A call of margin softmax on the CPU: the kernel for its dtype, and what precedes it where rows are long. Included
// inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
#pragma once

#include "common/long_rows.h"
#include "margin_softmax/cpu_kernel.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// A matrix whose long rows are multiplied by powers of two, which no cosine notices; as it is where it has none.
template <class T, class Storage>
class ShortenedRows {
 public:
  ShortenedRows(const void* rows, int64_t stride, int64_t count, int64_t dimensions)
      : rows_(static_cast<const Storage*>(rows)), stride_(stride), dimensions_(dimensions), scales_(count) {
    for_rows([this](int64_t i) { scales_[i] = scale_of_long_row<T>(rows_ + i * stride_, dimensions_); });
    if (std::all_of(scales_.begin(), scales_.end(), [](T scale) { return scale == 1; })) return;
    copy_.emplace(count * dimensions * sizeof(Storage));
    Storage* copy = static_cast<Storage*>(copy_->data());
    for_rows([&](int64_t i) {
      for (int64_t k = 0; k < dimensions_; ++k)
        copy[i * dimensions_ + k] = from_accumulate<Storage>(scales_[i] * T(to_accumulate(rows_[i * stride_ + k])));
    });
    rows_ = copy;
    stride_ = dimensions;
  }

  const void* data() const { return rows_; }
  int64_t stride() const { return stride_; }

  // The gradient with respect to the rows as they came, from that with respect to these; null where nobody wants it.
  void restore(void* gradient) const {
    if (!gradient || !copy_) return;
    for_rows([&](int64_t i) {
      if (scales_[i] == 1) return;
      Storage* row = static_cast<Storage*>(gradient) + i * dimensions_;
      for (int64_t k = 0; k < dimensions_; ++k)
        row[k] = from_accumulate<Storage>(scales_[i] * T(to_accumulate(row[k])));
    });
  }

 private:
  template <class Visit>
  void for_rows(const Visit& visit) const {
    const int64_t rows = static_cast<int64_t>(scales_.size()), tasks = std::min(available_threads(), rows);
    parallel_tasks(tasks, [&](int64_t task) {
      for (int64_t i = rows * task / tasks; i < rows * (task + 1) / tasks; ++i) visit(i);
    });
  }

  const Storage* rows_;
  int64_t stride_, dimensions_;
  std::vector<T> scales_;
  std::optional<Workspace> copy_;
};

template <class T, class Storage>
void run_margin_softmax(const MarginSoftmaxProblem& problem, bool backward) {
  {
    MarginSoftmax<T, Storage> kernel(problem, backward);
    backward ? kernel.backward() : kernel.forward();
    if (!kernel.found_long_rows()) return;
  }
  const ShortenedRows<T, Storage> features(problem.features, problem.features_stride, problem.samples,
                                           problem.dimensions);
  const ShortenedRows<T, Storage> weight(problem.weight, problem.weight_stride, problem.classes, problem.dimensions);
  MarginSoftmaxProblem shortened = problem;
  shortened.features = features.data();
  shortened.features_stride = features.stride();
  shortened.weight = weight.data();
  shortened.weight_stride = weight.stride();
  // Rows that are not finite are still long, and make what depends on them NaN.
  MarginSoftmax<T, Storage> kernel(shortened, backward, /*any_length=*/true);
  backward ? kernel.backward() : kernel.forward();
  features.restore(problem.grad_features);
  weight.restore(problem.grad_weight);
}

void margin_softmax(const MarginSoftmaxProblem& problem, bool backward) {
  switch (problem.dtype) {
    case Dtype::float32:
      return run_margin_softmax<float, float>(problem, backward);
    case Dtype::float64:
      return run_margin_softmax<double, double>(problem, backward);
    case Dtype::bfloat16:
      return run_margin_softmax<float, BFloat16>(problem, backward);
    case Dtype::float16:
      return run_margin_softmax<float, Float16>(problem, backward);
  }
}

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
