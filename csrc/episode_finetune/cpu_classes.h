// Rows over the classes of an episode: what a step of SGD computes for every class at once, a class a lane.
// Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
#pragma once

#include "episode_finetune/cpu_dots.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// `fixed` is the number of vectors in a row where the compiler is to know it, else 0.
template <class T, int fixed>
class ClassRows {
  using Int = typename Simd<T>::Int;
  using IntVector = typename Simd<T>::IntVector;

 public:
  static constexpr int lanes = Simd<T>::lanes;

  explicit ClassRows(int64_t way) : way_(static_cast<Int>(way)), vectors_((way + lanes - 1) / lanes) {}

  FEWSHOT_EXT_INLINE int64_t vectors() const { return fixed > 0 ? fixed : vectors_; }
  FEWSHOT_EXT_INLINE int64_t width() const { return vectors() * lanes; }

  // Of one sample, from its products with the classifiers and 1 / |w_c|, or 1 for inner products:
  // (softmax(scale (similarity - margin [c = label])) - [c = label]) * factor; 0 beyond the last class.
  FEWSHOT_EXT_INLINE void errors(const T* product, const T* inverse, int64_t label, T scale, T margin, T factor,
                                 T* to) const {
    const Vector<T> nothing = splat(-std::numeric_limits<T>::infinity());
    Vector<T> highest = nothing;
    for (int64_t v = 0; v < vectors(); ++v) {
      const Vector<T> similarity = load(product + v * lanes) * load(inverse + v * lanes);
      Vector<T> logit = scale * (is_target(v, label) ? similarity - margin : similarity);
      logit = classes(v) < way_ ? logit : nothing;
      highest = logit > highest ? logit : highest;
      store(to + v * lanes, logit);
    }
    const Vector<T> largest = max_in_lanes<T>(highest);
    Vector<T> total{};
    for (int64_t v = 0; v < vectors(); ++v) {
      const Vector<T> share = exp<T>(load(to + v * lanes) - largest);
      total += share;
      store(to + v * lanes, share);
    }
    const Vector<T> normalized = factor / sum_in_lanes<T>(total);
    for (int64_t v = 0; v < vectors(); ++v) {
      const Vector<T> probability = load(to + v * lanes) * normalized;
      store(to + v * lanes, is_target(v, label) ? probability - factor : probability);
    }
  }

 private:
  template <int... lane>
  static FEWSHOT_EXT_INLINE IntVector count_up(std::integer_sequence<int, lane...>) {
    return IntVector{lane...};
  }

  static FEWSHOT_EXT_INLINE IntVector classes(int64_t v) {
    return count_up(std::make_integer_sequence<int, lanes>()) + static_cast<Int>(v * lanes);
  }

  static FEWSHOT_EXT_INLINE IntVector is_target(int64_t v, int64_t label) {
    return classes(v) == static_cast<Int>(label);
  }

  Int way_;
  int64_t vectors_;
};

// 1 / |w| from |w|^2, class by class, and the factor of the projection in d cos(w, x) / d w: below the floor of the
// norm w is divided by a constant.
template <class T>
FEWSHOT_EXT_INLINE Vector<T> inverse_norms(const Vector<T>& squares) {
  T norms[Simd<T>::lanes];
  store(norms, squares > 0 ? squares : Vector<T>{});
#pragma GCC unroll 1  // so that it becomes one instruction
  for (T& norm : norms) norm = std::sqrt(norm);
  const Vector<T> norm = load(norms), floor = splat(T(finetune_norm_floor));
  return T(1) / (norm > floor ? norm : floor);
}

template <class T>
FEWSHOT_EXT_INLINE Vector<T> projections(const Vector<T>& inverse) {
  return inverse < T(1 / finetune_norm_floor) ? inverse * inverse : Vector<T>{};
}

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
