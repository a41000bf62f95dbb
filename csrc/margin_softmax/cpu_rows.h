// What margin softmax does with one vector of samples at a time: the running log-sum-exp over tiles of logits, and the
// softmax gradient. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
#pragma once

#include "margin_softmax/cpu_sums.h"
#include "margin_softmax/row_math.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// One thread's statistics of every row over the classes it has seen, [padded N] each. The target's logit takes no part
// in max and sum_exp.
template <class T>
struct RowStatistics {
  using Int = typename Simd<T>::Int;
  using IntVector = typename Simd<T>::IntVector;
  static constexpr int width = panel_width<T>;

  T *max, *sum_exp, *sum_logits, *target_logit, *best;
  T *sum_exp_excess, *sum_logits_excess;
  Int* best_class;

  void reset(int64_t padded) const {
    // Finite, so that a difference of two maxima is never inf - inf.
    std::fill(max, max + padded, std::numeric_limits<T>::lowest() / 4);
    std::fill(best, best + padded, -std::numeric_limits<T>::infinity());
    std::fill(best_class, best_class + padded, Int(-1));
    for (T* row : {sum_exp, sum_exp_excess, sum_logits, sum_logits_excess, target_logit})
      std::fill(row, row + padded, T(0));
  }

  // Products [rows][width] of a vector of samples with the classes from first_class on become logits, in place, and
  // enter the statistics at `sample`. factor is scale / |x_i|, inverse_w is 1 / |w_j| of those classes.
  FEWSHOT_EXT_INLINE void add_tile(int64_t sample, const Vector<T>& factor, const T* inverse_w, const IntVector& target,
                                   int64_t first_class, int rows, T* logits, bool smoothing, bool prediction) const {
    const Vector<T> excluded = splat(-std::numeric_limits<T>::infinity());
    const Vector<T> old_max = load(max + sample);
    Vector<T> new_max = old_max, at_target = load(target_logit + sample);
    for (int r = 0; r < rows; ++r) {
      const Vector<T> logit = load(logits + r * width) * (factor * inverse_w[r]);
      store(logits + r * width, logit);
      const IntVector is_target = target == static_cast<Int>(first_class + r);
      at_target = is_target ? logit : at_target;
      const Vector<T> rest = is_target ? excluded : logit;
      new_max = rest > new_max ? rest : new_max;
    }
    Vector<T> sum{};
    for (int r = 0; r < rows; ++r) {
      const IntVector is_target = target == static_cast<Int>(first_class + r);
      sum += exp<T>((is_target ? excluded : load(logits + r * width)) - new_max);
    }
    const Vector<T> shrink = exp<T>(old_max - new_max);
    add_without_excess<T>(sum, load(sum_exp + sample) * shrink, load(sum_exp_excess + sample) * shrink,
                          sum_exp + sample, sum_exp_excess + sample);
    store(max + sample, new_max);
    store(target_logit + sample, at_target);
    if (smoothing) {
      Vector<T> total{};
      for (int r = 0; r < rows; ++r) total += load(logits + r * width);
      add_without_excess<T>(total, load(sum_logits + sample), load(sum_logits_excess + sample), sum_logits + sample,
                            sum_logits_excess + sample);
    }
    if (prediction) {
      Vector<T> highest = load(best + sample);
      IntVector highest_class = load_int<T>(best_class + sample);
      for (int r = 0; r < rows; ++r) {
        const Vector<T> logit = load(logits + r * width);
        const IntVector better = logit > highest;
        highest = better ? logit : highest;
        highest_class = better ? IntVector{} + static_cast<Int>(first_class + r) : highest_class;
      }
      store(best + sample, highest);
      store(best_class + sample, highest_class);
    }
  }
};

// A row over all classes, from what the threads found in theirs.
template <class T>
struct JoinedRow {
  double max = std::numeric_limits<T>::lowest(), sum_exp = 0, sum_logits = 0, target_logit = 0;
  T best = -std::numeric_limits<T>::infinity();
  typename Simd<T>::Int best_class = -1;

  void add(const RowStatistics<T>& part, int64_t i) {
    const double part_max = part.max[i];
    if (part_max > max) {
      sum_exp *= std::exp(max - part_max);
      max = part_max;
    }
    const double part_sum = double(part.sum_exp[i]) - part.sum_exp_excess[i];
    sum_exp += part_max == max ? part_sum : part_sum * std::exp(part_max - max);
    sum_logits += double(part.sum_logits[i]) - part.sum_logits_excess[i];
    target_logit += part.target_logit[i];  // 0 but in the thread that owns the target class
    if (part.best[i] > best) {
      best = part.best[i];
      best_class = part.best_class[i];
    }
  }

  double log_sum_exp() const { return max + std::log(sum_exp); }
};

// GradientCoefficients of every row, [padded N] each.
template <class T>
struct RowCoefficients {
  using Int = typename Simd<T>::Int;
  using IntVector = typename Simd<T>::IntVector;
  static constexpr int lanes = Simd<T>::lanes, width = panel_width<T>;

  T *log_sum, *probability, *uniform, *at_target;

  // Rows that get no coefficients, the ignored ones and the padding, have probabilities e^(logit - max) = 0.
  void reset(int64_t padded) const {
    std::fill(log_sum, log_sum + padded, std::numeric_limits<T>::max());
    for (T* row : {probability, uniform, at_target}) std::fill(row, row + padded, T(0));
  }

  void set(int64_t i, const GradientCoefficients<double>& of) const {
    log_sum[i] = T(of.log_sum);
    probability[i] = T(of.probability);
    uniform[i] = T(of.uniform);
    at_target[i] = T(of.at_target);
  }

  // Logits [classes][width] of a vector of samples, or products that become logits by factor and inverse_w, -> G =
  // dL/ds / (|x_i| |w_j|). Adds up dL/ds * logit: over the classes into the dot of each row, which is returned, over
  // the samples, lane by lane, into class_dot [classes][lanes].
  template <bool products>
  FEWSHOT_EXT_INLINE Vector<T> gradient(int64_t sample, const T* logits, const Vector<T>& factor,
                                        const Vector<T>& inverse_x, const T* inverse_w, const IntVector& target,
                                        int64_t first_class, int64_t classes, T* to, T* class_dot) const {
    const Vector<T> log_sums = load(log_sum + sample), weight = load(probability + sample);
    const Vector<T> smoothed = load(uniform + sample), target_gradient = load(at_target + sample);
    Vector<T> dot{};
    for (int64_t j = 0; j < classes; ++j) {
      Vector<T> logit = load(logits + j * width);
      if (products) logit = logit * (factor * inverse_w[j]);
      Vector<T> g = weight * exp<T>(logit - log_sums) - smoothed;
      g = target == static_cast<Int>(first_class + j) ? target_gradient : g;
      const Vector<T> weighted = g * logit;
      dot += weighted;
      store(class_dot + j * lanes, load(class_dot + j * lanes) + weighted);
      store(to + j * width, g * (inverse_x * inverse_w[j]));
    }
    return dot;
  }
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
