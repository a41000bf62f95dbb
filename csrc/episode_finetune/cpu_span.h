// Training in the span of the support. Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
//
// Every gradient is a combination of support vectors and, by weight decay and the normalisation, of the classifier
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
    const int64_t width = rows_.width(), batch = std::min(settings_.batch_size, size_);
    gram_ = arena.take<double>(size_ * size_);
    products_ = arena.take<double>(size_ * 2 * width);
    coefficients_ = arena.take<double>((size_ + 1) * 2 * width);
    errors_ = arena.take<double>(batch * width);
    for (double** row : {&squares_, &along_, &speeds_, &inverse_, &decay_, &lengths_}) *row = arena.take<double>(width);
    scales_ = arena.take<double>(size_);
    factors_ = arena.take<double>(size_ + 1);
    terms_ = arena.take<const void*>(size_ + 1);
  }

  // From vectors [S + way]: the support, and the first classifiers.
  template <class From>
  void start(const From* const* vectors, int64_t dimensions) {
    const int64_t width = rows_.width();
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

  // A step of SGD on `count` support vectors.
  FEWSHOT_EXT_INLINE void step(const int32_t* batch, int64_t count, const int32_t* labels, bool first) {
    const int64_t width = rows_.width();
    const SgdStep sgd = settings_.sgd_step(first);
    const double factor = sgd.taken * settings_.scale / double(count);
    for (int64_t b = 0; b < count; ++b) {
      const double* product = products_ + batch[b] * 2 * width;
      rows_.errors(product, inverse_, labels[batch[b]], settings_.scale, settings_.margin, factor, errors_ + b * width);
    }
    // The gradient is P + decay w with P = sum_b errors_b x_b, both times `taken` already.
    for (int64_t v = 0; v < rows_.vectors(); ++v) {
      Row with_weight{}, with_velocity{}, decay = splat(sgd.taken * settings_.weight_decay);
      if (settings_.cosine) {
        const Row inverse = load(inverse_ + v * lanes);
        for (int64_t b = 0; b < count; ++b) {
          const double* product = products_ + batch[b] * 2 * width + v * lanes;
          const Row error = load(errors_ + b * width + v * lanes) * inverse;
          store(errors_ + b * width + v * lanes, error);
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
      store(decay_ + v * lanes, decay);
    }
    move_products(batch, count, sgd.kept);
    if (settings_.cosine) move_norms(batch, count, sgd.kept);
    move_coefficients(batch, count, sgd.kept);
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
  static FEWSHOT_EXT_INLINE Row magnitude(const Row& x) { return x < 0 ? -x : x; }

  // p = kept p + decay u + sum_b errors_b K_b, u -= lr p.
  void move_products(const int32_t* batch, int64_t count, double kept) {
    constexpr int64_t most = 4;
    for (int64_t b = 0; b < count; b += most) {
      const bool begins = b == 0, ends = b + most >= count;
      const double keep = begins ? kept : 1.0, lr = ends ? settings_.lr : 0.0;
      move_products<most>(std::min(most, count - b), batch + b, errors_ + b * rows_.width(), keep, begins ? 1.0 : 0.0,
                          lr);
    }
  }

  template <int samples>
  FEWSHOT_EXT_INLINE void move_products(int64_t count, const int32_t* batch, const double* errors, double kept,
                                        double decays, double lr) {
    if constexpr (samples > 1) {
      if (count != samples) return move_products<samples - 1>(count, batch, errors, kept, decays, lr);
    }
    const int64_t width = rows_.width();
    const double* similarity[samples];
    for (int b = 0; b < samples; ++b) similarity[b] = gram_ + batch[b] * size_;
    for (int64_t v = 0; v < rows_.vectors(); ++v) {
      Row error[samples];
#pragma GCC unroll 4
      for (int b = 0; b < samples; ++b) error[b] = load(errors + b * width + v * lanes);
      const Row decay = decays * load(decay_ + v * lanes);
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

  // B = kept B + decay A + errors, A -= lr B.
  void move_coefficients(const int32_t* batch, int64_t count, double kept) {
    const int64_t width = rows_.width();
    const double lr = settings_.lr;
    for (int64_t v = 0; v < rows_.vectors(); ++v) {
      const Row decay = load(decay_ + v * lanes);
      double* coefficient = coefficients_ + v * lanes;
      for (int64_t s = 0; s <= size_; ++s, coefficient += 2 * width) {
        const Row of_weight = load(coefficient);
        const Row of_velocity = kept * load(coefficient + width) + decay * of_weight;
        store(coefficient + width, of_velocity);
        store(coefficient, of_weight - lr * of_velocity);
      }
      for (int64_t b = 0; b < count; ++b) {
        double* moved = coefficients_ + batch[b] * 2 * width + v * lanes;
        const Row error = load(errors_ + b * width + v * lanes);
        store(moved + width, load(moved + width) + error);
        store(moved, load(moved) - lr * error);
      }
    }
  }

  void move_norms(const int32_t* batch, int64_t count, double kept) {
    const int64_t width = rows_.width();
    const double lr = settings_.lr;
    for (int64_t v = 0; v < rows_.vectors(); ++v) {
      Row speed = kept * load(speeds_ + v * lanes) + load(decay_ + v * lanes) * load(along_ + v * lanes);
      for (int64_t b = 0; b < count; ++b) {
        const double* product = products_ + batch[b] * 2 * width + v * lanes;
        speed += load(errors_ + b * width + v * lanes) * load(product + width);
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
  double* errors_;                      // [batch, width]
  double *squares_, *along_, *speeds_;  // [width] each: |w|^2, w . v, |v|^2; for cosines alone
  double *inverse_, *decay_;            // [width]: 1 / |w| or 1; the factor of w in the gradient
  double* lengths_;                     // [width]: |w0|
  double* scales_;                      // [S]: 1 / |x_s| or 1
  double* factors_;                     // [S + 1]
  const void** terms_;                  // [S + 1]
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
