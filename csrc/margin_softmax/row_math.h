// The formulas of one row, for the host and for GPUs.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/half.h"

namespace fewshot_ext {

constexpr double norm_floor = 1e-12;  // of torch.nn.functional.normalize

// How far the other classes' log-sum-exp lies above the target's logit, and what follows from it.
template <class T>
struct Gap {
  T loss;        // softplus(gap) = -log p_iy
  T off_target;  // sigmoid(gap) = 1 - p_iy

  FEWSHOT_EXT_HOST_DEVICE explicit Gap(T gap) {
    const T tail = std::exp(gap > 0 ? -gap : gap);
    loss = (gap > 0 ? gap : T(0)) + std::log1p(tail);
    off_target = (gap > 0 ? T(1) : tail) / (1 + tail);
  }
};

// The row's loss. `target` is the target's logit with its margin, `mean_logit` the mean over all logits, that one
// included.
template <class T>
FEWSHOT_EXT_HOST_DEVICE T row_loss(const Gap<T>& gap, T target, T mean_logit, T smoothing) {
  return smoothing != 0 ? gap.loss + smoothing * (target - mean_logit) : gap.loss;
}

// dL/dl_ij = g (p_ij - [j = y] (1 - eps) - eps / C), where g is the row's upstream gradient times the scale.
template <class T>
struct GradientCoefficients {
  T log_sum;      // over all classes, the target's with its margin
  T probability;  // factor of p_ij = e^(l_ij - log_sum)
  T uniform;      // subtracted from it
  T at_target;    // the whole entry of the target

  // The target's entry is formed from the sigmoid itself: p_iy - 1 would cancel where the margin leaves a tiny loss.
  FEWSHOT_EXT_HOST_DEVICE static GradientCoefficients of(const Gap<T>& gap, T target, T g, T smoothing,
                                                         int64_t classes) {
    const T uniform = smoothing / T(classes);
    return {target + gap.loss, g, g * uniform, g * (smoothing - uniform - gap.off_target)};
  }

  // For a row that gets no gradient: every probability is e^(logit - max) = 0, whatever the logits.
  FEWSHOT_EXT_HOST_DEVICE static GradientCoefficients none(T largest) { return {largest, T(0), T(0), T(0)}; }
};

}  // namespace fewshot_ext
