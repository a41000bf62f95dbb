// Training in the span of the support. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
//
// Every gradient is a combination of support vectors and, by weight decay and the normalization, of the classifier
// itself: w_c = a_c w0_c + sum_s A_cs x_s all the while, and so is the velocity v_c with coefficients b_c, B_cs. A step
// needs the products u_cs = w_c . x_s, and from p_cs = v_c . x_s and the Gram matrix of the support it also has the
// next ones. So once the Gram matrix is known no step looks at a vector of D dimensions: with 25 vectors of 512 a step
// takes a twentieth of the arithmetic.
//
// All of it is in double, whatever the features: a Gram matrix has the square of their condition, and with five classes
// a vector of eight doubles takes as long as one of sixteen floats.
#pragma once

#include "common/memory.h"
#include "episode_finetune/cpu_classes.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

template <int fixed>
class SpanTraining {
  using Row = Vector<double>;
  static constexpr int lanes = Simd<double>::lanes;

 public:
  SpanTraining(const FinetuneSettings& settings, int64_t support_size, int64_t way)
      : settings_(settings), rows_(way), size_(support_size), way_(way) {}

  void lay_out(ByteArena& arena) {
    const int64_t width = rows_.width(), steps = (size_ + settings_.batch_size - 1) / settings_.batch_size;
    gram_ = arena.take<double>(size_ * size_);
    products_ = arena.take<double>(size_ * 2 * width);
    coefficients_ = arena.take<double>((size_ + 1) * 2 * width);
    errors_ = arena.take<double>(size_ * width);
    decays_ = arena.take<double>(steps * width);
    entered_ = arena.take<double>(steps * 2 * width);
    for (double** row : {&squares_, &along_, &speeds_, &inverse_, &lengths_, &shrink_})
      *row = arena.take<double>(width);
    scales_ = arena.take<double>(size_);
    factors_ = arena.take<double>(size_ + 1);
    terms_ = arena.take<const void*>(size_ + 1);
  }

  // From vectors [S + way]: the support, and the first classifiers, with the factor of each one's gradient.
  template <class From>
  void start(const From* const* vectors, int64_t dimensions, const From* shrink) {
    const int64_t width = rows_.width();
    std::fill(shrink_, shrink_ + width, 1.0);
    std::copy_n(shrink, way_, shrink_);
    std::fill(products_, products_ + size_ * 2 * width, 0.0);
    std::fill(coefficients_, coefficients_ + (size_ + 1) * 2 * width, 0.0);
    for (double* row : {squares_, along_, speeds_, lengths_}) std::fill(row, row + width, 0.0);
    std::fill(inverse_, inverse_ + width, 1.0);
    for (int64_t c = 0; c < way_; ++c) coefficients_[size_ * 2 * width + c] = 1;

    for (int64_t s = 0; s < size_; s += dot_rows) {
      const int64_t count = std::min<int64_t>(dot_rows, size_ - s);
      each_dot<double>(vectors + s, count, vectors + s, size_ + way_ - s, dimensions,
                       [&](int64_t m, int64_t n, double dot) {
                         const int64_t row = s + m, column = s + n;
                         if (column < size_)
                           gram_[row * size_ + column] = gram_[column * size_ + row] = dot;
                         else
                           products_[row * 2 * width + column - size_] = dot;
                       });
    }
    for (int64_t s = 0; s < size_; ++s) scales_[s] = settings_.cosine ? inverse_norm(gram_[s * size_ + s]) : 1.0;
    if (!settings_.cosine) return;
    for (int64_t s = 0; s < size_; ++s) {
      for (int64_t t = 0; t < size_; ++t) gram_[s * size_ + t] *= scales_[s] * scales_[t];
      for (int64_t c = 0; c < way_; ++c) products_[s * 2 * width + c] *= scales_[s];
    }
    for (int64_t c = 0; c < way_; ++c) {
      squares_[c] = squared_norm<double>(vectors[size_ + c], dimensions);
      lengths_[c] = std::sqrt(squares_[c]);
    }
    for (int64_t v = 0; v < rows_.vectors(); ++v)
      store(inverse_ + v * lanes, inverse_norms<double>(load(squares_ + v * lanes)));
  }

  // Steps of SGD through the support in this order; false if the coefficients can no longer tell the classifiers.
  bool pass(const int32_t* order, const int32_t* labels, bool first, double largest_share) {
    const int64_t width = rows_.width(), batch = settings_.batch_size;
    for (int64_t begin = 0; begin < size_; begin += batch)
      step(order + begin, std::min(batch, size_ - begin), labels, settings_.sgd_step(first && begin == 0),
           errors_ + begin * width, decays_ + begin / batch * width);
    move_coefficients(order, first);
    return sound(largest_share);
  }

  // w_c [D].
  template <class From>
  void finish(const From* const* vectors, int64_t dimensions, int64_t c, double* weight) {
    const int64_t width = rows_.width();
    const auto** terms = reinterpret_cast<const From**>(terms_);
    for (int64_t s = 0; s <= size_; ++s) {
      factors_[s] = coefficients_[s * 2 * width + c] * (s < size_ ? scales_[s] : 1.0);
      terms[s] = vectors[s < size_ ? s : size_ + c];
    }
    combine(factors_, terms, size_ + 1, dimensions, weight);
  }

 private:
  void step(const int32_t* batch, int64_t count, const int32_t* labels, const SgdStep& sgd, double* errors,
            double* decays) {
    const int64_t width = rows_.width();
    const double factor = sgd.taken * settings_.scale / double(count);
    for (int64_t b = 0; b < count; ++b) {
      const double* product = products_ + batch[b] * 2 * width;
      rows_.errors(product, inverse_, labels[batch[b]], settings_.scale, settings_.margin, factor, errors + b * width);
    }
    // The gradient is P + decay w with P = sum_b errors_b x_b, both times `taken` already.
    for (int64_t v = 0; v < rows_.vectors(); ++v) {
      Row with_weight{}, with_velocity{}, decay = splat(sgd.taken * settings_.weight_decay);
      if (settings_.cosine) {
        const Row inverse = load(inverse_ + v * lanes), pull = inverse * load(shrink_ + v * lanes);
        for (int64_t b = 0; b < count; ++b) {
          const double* product = products_ + batch[b] * 2 * width + v * lanes;
          const Row error = load(errors + b * width + v * lanes) * pull;
          store(errors + b * width + v * lanes, error);
          with_weight += error * load(product);
          with_velocity += error * load(product + width);
        }
        // d cos(w, x) / d w = (x - cos(w, x) w / |w|) / |w| for unit x: its second part decays w.
        decay -= with_weight * projections<double>(inverse);
        const Row squares = load(squares_ + v * lanes), along = load(along_ + v * lanes);
        const Row speeds = load(speeds_ + v * lanes);
        // w . v and v . (the old v) for the new v; what is still missing is P . v.
        store(along_ + v * lanes, sgd.kept * along + with_weight + decay * squares);
        store(speeds_ + v * lanes, sgd.kept * speeds + with_velocity + decay * along);
      }
      store(decays + v * lanes, decay);
    }
    move_products(batch, count, sgd.kept, errors, decays);
    if (settings_.cosine) move_norms(batch, count, sgd.kept, errors, decays);
  }

  // Whether the coefficients still tell the classifiers. Where a classifier is short and points along its gradient, a
  // long step leaves it where it is, as a difference of terms that grow by the length of the step: too large for too
  // many steps, they leave nothing of it but rounding. (1 + the share of the largest terms in it) * 2^-53 is the error.
  bool sound(double most) const {
    if (!settings_.cosine) return true;
    const int64_t width = rows_.width();
    for (int64_t v = 0; v < rows_.vectors(); ++v) {
      const double* coefficient = coefficients_ + v * lanes;
      Row total = magnitude(load(coefficient + size_ * 2 * width)) * load(lengths_ + v * lanes);
      for (int64_t s = 0; s < size_; ++s) total += magnitude(load(coefficient + s * 2 * width));
      const Row share = total * load(inverse_ + v * lanes);
      for (int64_t k = 0; k < std::min<int64_t>(lanes, way_ - v * lanes); ++k)
        if (!(share[k] <= most)) return false;
    }
    return true;
  }

  static FEWSHOT_EXT_INLINE Row magnitude(const Row& x) { return x < 0 ? -x : x; }

  // p = kept p + decay u + sum_b errors_b K_b, u -= lr p.
  void move_products(const int32_t* batch, int64_t count, double kept, const double* errors, const double* decays) {
    constexpr int64_t most = 4;
    for (int64_t b = 0; b < count; b += most) {
      const bool begins = b == 0, ends = b + most >= count;
      const double keep = begins ? kept : 1.0, lr = ends ? settings_.lr : 0.0;
      move_products<most>(std::min(most, count - b), batch + b, errors + b * rows_.width(), decays, keep,
                          begins ? 1.0 : 0.0, lr);
    }
  }

  template <int samples>
  FEWSHOT_EXT_INLINE void move_products(int64_t count, const int32_t* batch, const double* errors, const double* decays,
                                        double kept, double decay_factor, double lr) {
    if constexpr (samples > 1) {
      if (count != samples) return move_products<samples - 1>(count, batch, errors, decays, kept, decay_factor, lr);
    }
    const int64_t width = rows_.width();
    const double* similarity[samples];
    for (int b = 0; b < samples; ++b) similarity[b] = gram_ + batch[b] * size_;
    for (int64_t v = 0; v < rows_.vectors(); ++v) {
      Row error[samples];
#pragma GCC unroll 4
      for (int b = 0; b < samples; ++b) error[b] = load(errors + b * width + v * lanes);
      const Row decay = decay_factor * load(decays + v * lanes);
      double* product = products_ + v * lanes;
      for (int64_t s = 0; s < size_; ++s, product += 2 * width) {
        const Row with_weight = load(product);
        Row with_velocity = kept * load(product + width) + decay * with_weight;
#pragma GCC unroll 4
        for (int b = 0; b < samples; ++b) with_velocity += error[b] * similarity[b][s];
        store(product + width, with_velocity);
        store(product, with_weight - lr * with_velocity);
      }
    }
  }

  // Every step B = kept B + decay A + errors, A -= lr B. Between the few steps that have errors for it, a coefficient
  // goes through the same linear maps as all others of its class: a pass multiplies these up, from its end, and
  // then touches every coefficient once.
  void move_coefficients(const int32_t* order, bool first) {
    const int64_t width = rows_.width(), batch = settings_.batch_size, steps = (size_ + batch - 1) / batch;
    const double lr = settings_.lr;
    for (int64_t v = 0; v < rows_.vectors(); ++v) {
      // The map from A and B after a step to those after the pass.
      Row a_from_a = splat(1.0), a_from_b{}, b_from_a{}, b_from_b = splat(1.0);
      for (int64_t step = steps - 1; step >= 0; --step) {
        double* entered = entered_ + step * 2 * width + v * lanes;
        const double kept = settings_.sgd_step(first && step == 0).kept;
        const Row decay = load(decays_ + step * width + v * lanes);
        // What enters B leaves A by lr times as much.
        const Row a = a_from_b - lr * a_from_a, b = b_from_b - lr * b_from_a;
        store(entered, a);
        store(entered + width, b);
        a_from_a += decay * a;
        b_from_a += decay * b;
        a_from_b = kept * a;
        b_from_b = kept * b;
      }
      for (int64_t k = 0; k <= size_; ++k) {
        double* coefficient = coefficients_ + (k < size_ ? order[k] : size_) * 2 * width + v * lanes;
        const Row of_weight = load(coefficient), of_velocity = load(coefficient + width);
        Row next_weight = a_from_a * of_weight + a_from_b * of_velocity;
        Row next_velocity = b_from_a * of_weight + b_from_b * of_velocity;
        if (k < size_) {
          const double* entered = entered_ + k / batch * 2 * width + v * lanes;
          const Row error = load(errors_ + k * width + v * lanes);
          next_weight += load(entered) * error;
          next_velocity += load(entered + width) * error;
        }
        store(coefficient, next_weight);
        store(coefficient + width, next_velocity);
      }
    }
  }

  void move_norms(const int32_t* batch, int64_t count, double kept, const double* errors, const double* decays) {
    const int64_t width = rows_.width();
    const double lr = settings_.lr;
    for (int64_t v = 0; v < rows_.vectors(); ++v) {
      Row speed = kept * load(speeds_ + v * lanes) + load(decays + v * lanes) * load(along_ + v * lanes);
      for (int64_t b = 0; b < count; ++b) {
        const double* product = products_ + batch[b] * 2 * width + v * lanes;
        speed += load(errors + b * width + v * lanes) * load(product + width);
      }
      const Row along = load(along_ + v * lanes);
      const Row squares = load(squares_ + v * lanes) - lr * (2 * along - lr * speed);
      store(squares_ + v * lanes, squares);
      store(along_ + v * lanes, along - lr * speed);
      store(speeds_ + v * lanes, speed);
      store(inverse_ + v * lanes, inverse_norms<double>(squares));
    }
  }

  const FinetuneSettings settings_;
  const ClassRows<double, fixed> rows_;
  const int64_t size_, way_;
  double* gram_;                        // [S, S]
  double* products_;                    // [S, 2, width]: u and p
  double* coefficients_;                // [S + 1, 2, width]: A and B, in the last row a and b
  double* errors_;                      // [S, width], in the order of the pass
  double* decays_;                      // [steps of a pass, width]: the factor of w in the gradient
  double* entered_;                     // [steps of a pass, 2, width]: what an error of the step adds to A and B
  double *squares_, *along_, *speeds_;  // [width] each: |w|^2, w . v, |v|^2; for cosines alone
  double* inverse_;                     // [width]: 1 / |w| or 1
  double* lengths_;                     // [width]: |w0|
  double* shrink_;                      // [width]: factor of the gradient
  double* scales_;                      // [S]: 1 / |x_s| or 1
  double* factors_;                     // [S + 1]
  const void** terms_;                  // [S + 1]
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
