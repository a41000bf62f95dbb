// What the CUDA kernels of margin softmax know about a row: what was found over its classes, and what follows for its
// loss and gradient.
#pragma once

#include <limits>

#include "common/four.cuh"
#include "common/reduce.cuh"
#include "margin_softmax/problem.h"
#include "margin_softmax/row_math.h"

namespace fewshot_ext {

// Some of a row's logits, in the order of their classes. The target's takes no part in max and sum_exp.
template <class T>
struct PartOfRow {
  // Finite, so that a difference of two maxima is never inf - inf.
  static constexpr T lowest = std::numeric_limits<T>::lowest() / 4;
  static constexpr T infinity = std::numeric_limits<T>::infinity();
  static constexpr int no_class = std::numeric_limits<int>::max();

  T max;
  T sum_exp;  // of e^(logit - max)
  T sum_logits;
  T best;
  int best_class;  // the first of those that tie

  __device__ static PartOfRow empty() { return {lowest, T(0), T(0), -infinity, no_class}; }

  // Logits of the classes from j on, of which the first `count` exist. Without branches, so that the loads of several
  // calls can be under way together.
  __device__ __forceinline__ void add(const Four<T>& logits, int64_t j, int64_t count, int64_t target) {
    T others[4], top = max;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const T logit = c < count ? logits.at[c] : -infinity;
      sum_logits += c < count ? logit : T(0);
      best_class = logit > best ? static_cast<int>(j + c) : best_class;
      best = logit > best ? logit : best;
      others[c] = j + c == target ? -infinity : logit;
      top = others[c] > top ? others[c] : top;
    }
    sum_exp *= std::exp(max - top);
    max = top;
#pragma unroll
    for (int c = 0; c < 4; ++c) sum_exp += std::exp(others[c] - top);
  }

  __device__ __forceinline__ void add(const PartOfRow& other) {
    sum_logits += other.sum_logits;
    if (other.best > best || (other.best == best && other.best_class < best_class)) {
      best = other.best;
      best_class = other.best_class;
    }
    const T joined = other.max > max ? other.max : max;
    sum_exp = sum_exp * std::exp(max - joined) + other.sum_exp * std::exp(other.max - joined);
    max = joined;
  }

  // Adds up the parts of `width` neighboring lanes. The first lane's result counts: where the compiler contracts to
  // fused multiply-adds, those of the others may differ in the last bit.
  template <int width>
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int distance = width / 2; distance > 0; distance /= 2) {
      PartOfRow other;
      other.max = __shfl_xor_sync(all_lanes, max, distance);
      other.sum_exp = __shfl_xor_sync(all_lanes, sum_exp, distance);
      other.sum_logits = __shfl_xor_sync(all_lanes, sum_logits, distance);
      other.best = __shfl_xor_sync(all_lanes, best, distance);
      other.best_class = __shfl_xor_sync(all_lanes, best_class, distance);
      add(other);
    }
  }
};

enum class Label { counted, elsewhere, ignored, invalid };

// Labels, settings and results of a call's rows.
template <class T>
struct Rows {
  const int64_t* target;  // [N]
  int64_t ignore_index;
  int64_t samples, classes, total_classes;
  T margin, scale, smoothing;
  Reduction reduction;
  T* statistics;        // [4, N]
  const T* upstream;    // [N]; null in the forward pass
  T* loss;              // [] or [N]
  int64_t* prediction;  // [N] or null

  static Rows of(const MarginSoftmaxProblem& problem) {
    return {problem.target,
            problem.ignore_index,
            problem.samples,
            problem.classes,
            problem.total_classes,
            T(problem.margin),
            T(problem.scale),
            T(problem.label_smoothing),
            problem.reduction,
            static_cast<T*>(problem.row_statistics),
            static_cast<const T*>(problem.grad_loss),
            static_cast<T*>(problem.loss),
            problem.prediction};
  }

  __device__ __forceinline__ Label label(int64_t i) const {
    const int64_t label = target[i];
    if (label == ignore_index) return Label::ignored;
    if (label < 0 || label >= total_classes) return Label::invalid;
    return label < classes ? Label::counted : Label::elsewhere;
  }

  // -1 unless the row counts and its class is here.
  __device__ __forceinline__ int target_class(int64_t i) const {
    return label(i) == Label::counted ? static_cast<int>(target[i]) : -1;
  }

  // How many rows the mean is over. Every thread of the block of `threads` has to call it.
  template <int threads>
  __device__ int64_t count() const {
    long long counted = 0;
    for (int64_t i = threadIdx.x; i < samples; i += threads) counted += target[i] != ignore_index;
    return block_sum<threads>(counted);
  }

  // What the losses of all shards are formed from: the log-sum-exp over the classes other than the target, and the
  // target's logit with its margin. A label out of range has a loss that is not a number: no kernel can raise an error
  // without making the host wait.
  struct Sums {
    T others, at_target;
  };

  __device__ __forceinline__ Sums sums(int64_t i, const PartOfRow<T>& row, T target_logit) const {
    if (label(i) == Label::invalid) return {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::quiet_NaN()};
    return {row.max + std::log(row.sum_exp), target_logit - scale * margin};
  }

  // Writes the row's statistics, prediction and, without a reduction, loss; returns the loss.
  __device__ T finish(int64_t i, const PartOfRow<T>& row, T target_logit) const {
    const auto [others, at_target] = sums(i, row, target_logit);
    statistics[i] = others;
    statistics[samples + i] = at_target;
    statistics[2 * samples + i] = row.sum_logits;
    statistics[3 * samples + i] = row.best;
    if (prediction != nullptr) prediction[i] = row.best_class == PartOfRow<T>::no_class ? 0 : row.best_class;
    const T mean_logit = (row.sum_logits - scale * margin) / T(total_classes);
    const T value =
        label(i) == Label::ignored ? T(0) : row_loss(Gap<T>(others - at_target), at_target, mean_logit, smoothing);
    if (reduction == Reduction::none) loss[i] = value;
    return value;
  }

  // What the row's gradient is made of; `others` and `at_target` as in the statistics, `weight` the derivative of the
  // result by the row's loss.
  __device__ GradientCoefficients<T> coefficients(int64_t i, T others, T at_target, T weight) const {
    if (label(i) == Label::ignored) return GradientCoefficients<T>::none(-4 * PartOfRow<T>::lowest);
    return GradientCoefficients<T>::of(Gap<T>(others - at_target), at_target, weight * scale, smoothing, total_classes);
  }
};

// dL/dl_ij.
template <class T>
__device__ __forceinline__ T gradient_entry(const GradientCoefficients<T>& row, T logit, bool is_target) {
  const T other = row.probability * std::exp(logit - row.log_sum) - row.uniform;
  return is_target ? row.at_target : other;
}

// With plain vectors as the other factor, dL/ds as a factor of products is divided by |x_i| |w_j|. float16 has no range
// for that: there the other factor is normalized and this one multiplied by a power of 2 that lifts the largest entry
// to between 2^13 and 2^14, which leaves room for rounding.
template <class T>
__device__ __forceinline__ T operand_scale(T largest) {
  int exponent = 0;
  std::frexp(largest, &exponent);
  const bool normal = largest > 0 && largest < PartOfRow<T>::infinity;
  return normal ? std::ldexp(T(1), min(14 - exponent, 100)) : T(1);
}

// 1 / |x|, as torch.nn.functional.normalize has it, from |x|^2. Not a number where |x| is so large that products with
// other rows may overflow, or 1 / (|x| |w|) lose what it is multiplied by: the CPU shortens such rows first, which here
// would cost every call another pass over its rows.
template <class T>
__device__ __forceinline__ T inverse_norm(T squares) {
  constexpr T most = sizeof(T) == sizeof(float) ? T(0x1p80) : T(0x1p800);
  const T norm = std::sqrt(squares);
  if (squares > most) return std::numeric_limits<T>::quiet_NaN();
  return T(1) / (norm > T(norm_floor) ? norm : T(norm_floor));
}

// 1 / |x| by a warp, the same in all lanes; without cosines 1.
template <class Storage, class T = Accumulate<Storage>>
__device__ __forceinline__ T inverse_norm(const Storage* x, int64_t dimensions, bool fours, bool cosine) {
  if (!cosine) return T(1);
  T squares = 0;
  for (int64_t k = threadIdx.x % warp_lanes * 4; k < dimensions; k += 4 * warp_lanes) {
    const Four<T> values = load_four(x + k, dimensions - k, fours);
#pragma unroll
    for (int c = 0; c < 4; ++c) squares += values.at[c] * values.at[c];
  }
  return inverse_norm(warp_sum(squares));
}

// dL/dx = raw - projection * (dL/ds . s) x, where raw treats |x| as a constant. Below the floor of the norm it is one.
template <class T>
__device__ __forceinline__ T projection(T inverse) {
  return inverse < T(1 / norm_floor) ? inverse * inverse : T(0);
}

}  // namespace fewshot_ext
