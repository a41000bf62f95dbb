// Training on the vectors themselves, for supports too large for their Gram matrix to pay.
// Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
#pragma once

#include "common/memory.h"
#include "episode_finetune/cpu_classes.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

template <class T, int fixed>
class DirectTraining {
  static constexpr int64_t lanes = Simd<T>::lanes;

 public:
  DirectTraining(const FinetuneSettings& settings, int64_t support_size, int64_t way, int64_t dimensions)
      : settings_(settings),
        rows_(way),
        size_(support_size),
        way_(way),
        stride_((dimensions + lanes - 1) / lanes * lanes) {}

  void lay_out(ByteArena& arena) {
    const int64_t width = rows_.width(), batch = std::min(settings_.batch_size, size_);
    support_ = arena.take<T>(size_ * stride_);
    weight_ = arena.take<T>(way_ * stride_);
    velocity_ = arena.take<T>(way_ * stride_);
    products_ = arena.take<T>(batch * width);
    errors_ = arena.take<T>(batch * width);
    inverse_ = arena.take<T>(width);
    shrink_ = arena.take<T>(way_);
    images_ = arena.take<const T*>(batch);
    classifiers_ = arena.take<const T*>(way_);
  }

  // From vectors [S + way]: the support, and the first classifiers, with the factor of each one's gradient.
  void start(const T* const* vectors, int64_t dimensions, const T* shrink) {
    std::copy_n(shrink, way_, shrink_);
    for (int64_t s = 0; s < size_; ++s) {
      const double scale = settings_.cosine ? inverse_norm(squared_norm<double>(vectors[s], dimensions)) : 1.0;
      T* image = support_ + s * stride_;
      for (int64_t k = 0; k < dimensions; ++k) image[k] = T(vectors[s][k] * scale);
      std::fill(image + dimensions, image + stride_, T(0));
    }
    std::fill(velocity_, velocity_ + way_ * stride_, T(0));
    std::fill(products_, products_ + std::min(settings_.batch_size, size_) * rows_.width(), T(0));
    std::fill(inverse_, inverse_ + rows_.width(), T(1));
    for (int64_t c = 0; c < way_; ++c) {
      T* weight = weight_ + c * stride_;
      std::copy(vectors[size_ + c], vectors[size_ + c] + dimensions, weight);
      std::fill(weight + dimensions, weight + stride_, T(0));
      classifiers_[c] = weight;
      if (settings_.cosine) inverse_[c] = inverse_norm(squared_norm<T>(weight, stride_));
    }
  }

  // Steps of SGD through the support in this order.
  bool pass(const int32_t* order, const int32_t* labels, bool first, double) {
    const int64_t batch = settings_.batch_size;
    for (int64_t begin = 0; begin < size_; begin += batch)
      step(order + begin, std::min(batch, size_ - begin), labels, settings_.sgd_step(first && begin == 0));
    return true;
  }

  // w_c [D].
  void finish(const T* const*, int64_t dimensions, int64_t c, double* weight) const {
    std::copy(weight_ + c * stride_, weight_ + c * stride_ + dimensions, weight);
  }

 private:
  void step(const int32_t* batch, int64_t count, const int32_t* labels, const SgdStep& sgd) {
    const int64_t width = rows_.width();
    const T factor = T(sgd.taken * settings_.scale / double(count));
    for (int64_t b = 0; b < count; ++b) images_[b] = support_ + batch[b] * stride_;
    each_dot<T>(images_, count, classifiers_, way_, stride_,
                [&](int64_t b, int64_t c, T dot) { products_[b * width + c] = dot; });
    for (int64_t b = 0; b < count; ++b)
      rows_.errors(products_ + b * width, inverse_, labels[batch[b]], T(settings_.scale), T(settings_.margin), factor,
                   errors_ + b * width);
    for (int64_t c = 0; c < way_; ++c) {
      T decay = T(sgd.taken * settings_.weight_decay);
      if (settings_.cosine) {
        // d cos(w, x) / d w = (x - cos(w, x) w / |w|) / |w| for unit x: its second part decays w.
        T with_weight = 0;
        for (int64_t b = 0; b < count; ++b) {
          T& error = errors_[b * width + c];
          error *= inverse_[c] * shrink_[c];
          with_weight += error * products_[b * width + c];
        }
        decay -= with_weight * projection(inverse_[c]);
      }
      const T squares = move(c, count, T(sgd.kept), decay);
      if (settings_.cosine) inverse_[c] = inverse_norm(squares);
    }
  }

  // v = kept v + decay w + sum_b errors_b x_b, w -= lr v; returns |w|^2.
  T move(int64_t c, int64_t count, T kept, T decay) {
    constexpr int64_t most = 4;
    const T* errors = errors_ + c;
    T squares = 0;
    for (int64_t b = 0; b < count; b += most) {
      const bool begins = b == 0, ends = b + most >= count;
      squares = move<most>(c, std::min(most, count - b), images_ + b, errors + b * rows_.width(), begins ? kept : T(1),
                           begins ? decay : T(0), ends ? T(settings_.lr) : T(0));
    }
    return squares;
  }

  template <int samples>
  FEWSHOT_EXT_INLINE T move(int64_t c, int64_t count, const T* const* images, const T* errors, T kept, T decay, T lr) {
    if constexpr (samples > 1) {
      if (count != samples) return move<samples - 1>(c, count, images, errors, kept, decay, lr);
    }
    T error[samples];
    const T* image[samples];
    for (int b = 0; b < samples; ++b) {
      error[b] = errors[b * rows_.width()];
      image[b] = images[b];
    }
    T* weight = weight_ + c * stride_;
    T* velocity = velocity_ + c * stride_;
    Vector<T> squares{};
    for (int64_t k = 0; k < stride_; k += lanes) {
      const Vector<T> old = load(weight + k);
      Vector<T> moved = kept * load(velocity + k) + decay * old;
#pragma GCC unroll 4
      for (int b = 0; b < samples; ++b) moved += error[b] * load(image[b] + k);
      const Vector<T> next = old - lr * moved;
      store(velocity + k, moved);
      store(weight + k, next);
      squares += next * next;
    }
    return sum_in_lanes<T>(squares)[0];
  }

  const FinetuneSettings settings_;
  const ClassRows<T, fixed> rows_;
  const int64_t size_, way_, stride_;
  T* support_;             // [S, stride]: x_s, normalized for cosines
  T *weight_, *velocity_;  // [way, stride]
  T *products_, *errors_;  // [batch, width]
  T* inverse_;             // [width]: 1 / |w_c| or 1
  T* shrink_;              // [way]: factor of the gradient
  const T** images_;       // [batch]
  const T** classifiers_;  // [way]
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
