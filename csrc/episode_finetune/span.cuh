// Training in the span of the support, a block for each episode; cpu_span.h has the idea and the reasons.
#pragma once

#include "episode_finetune/kernels.cuh"

namespace fewshot_ext {

struct FinetuneSpan {
  static constexpr int threads = 128, warps = threads / warp_lanes;
  static constexpr int blocks_of_processor = 5;  // 600 episodes then fit on 132 processors together
  static constexpr int most_support = 64;
  static constexpr int64_t most_bytes = 47 << 10;  // of the 48 KiB that every GPU has for a block; sums take some

  // The arrays of an episode, for which a launch asks: with less of them more blocks share a multiprocessor.
  static int64_t bytes(int64_t support_size, int64_t way, int64_t batch_size) {
    const int64_t batch = batch_size < support_size ? batch_size : support_size;
    const int64_t doubles = support_size * (support_size + 4 * way + 1) + batch * way + 8 * way;
    return doubles * static_cast<int64_t>(sizeof(double)) + 4 * support_size * static_cast<int64_t>(sizeof(int));
  }

  static bool takes(int64_t support_size, int64_t way, int64_t batch_size) {
    return support_size <= most_support && bytes(support_size, way, batch_size) <= most_bytes;
  }
};

namespace finetune_device {

// All arrays hold class after class: [way, S], [batch, way], [way].
template <class Storage>
class SpanTraining {
  static constexpr int threads = FinetuneSpan::threads;

 public:
  // `memory`: shared, of FinetuneSpan::bytes.
  __device__ SpanTraining(const EpisodeFinetune<Storage>& p, int64_t episode, double* memory)
      : p_(p),
        settings_(p.problem.settings),
        episode_(episode),
        size_(static_cast<int>(p.problem.support_size)),
        way_(static_cast<int>(p.problem.way)),
        batch_(static_cast<int>(min(p.problem.settings.batch_size, p.problem.support_size))) {
    const auto take = [&memory](int count) {
      double* taken = memory;
      memory += count;
      return taken;
    };
    gram_ = take(size_ * size_);
    with_weight_ = take(way_ * size_);
    with_velocity_ = take(way_ * size_);
    of_weight_ = take(way_ * size_);
    of_velocity_ = take(way_ * size_);
    scale_ = take(size_);
    errors_ = take(batch_ * way_);
    start_weight_ = take(way_);
    start_velocity_ = take(way_);
    squares_ = take(way_);
    along_ = take(way_);
    speed_ = take(way_);
    inverse_ = take(way_);
    decay_ = take(way_);
    length_ = take(way_);
    seen_ = reinterpret_cast<int*>(memory);
    place_ = seen_ + size_;
    order_ = place_ + size_;
    label_ = order_ + size_;
  }

  // Whether the episode is finished: not if its coefficients cannot tell the classifiers, see cpu_span.h.
  __device__ bool run() {
    if (!labels_in_range(p_, episode_)) {
      poison(p_, episode_);
      return true;
    }
    start();
    const int passes = static_cast<int>(p_.problem.passes);
    for (int pass = 0; pass < passes; ++pass) {
      const int64_t* order = p_.order(episode_, pass);
      if (!is_permutation(order, size_, pass + 1, seen_)) {
        poison(p_, episode_);
        return true;
      }
      for (int k = threadIdx.x; k < size_; k += threads) {
        const int s = static_cast<int>(order[k]);
        order_[k] = s;
        place_[s] = k;
      }
      __syncthreads();
      for (int begin = 0; begin < size_; begin += batch_)
        step(begin, min(batch_, size_ - begin), pass == 0 && begin == 0);
      if (!sound()) return false;
    }
    finish();
    return true;
  }

 private:
  __device__ void start() {
    const int warp = static_cast<int>(threadIdx.x) / warp_lanes, lane = static_cast<int>(threadIdx.x) % warp_lanes;
    const int64_t dimensions = p_.problem.dimensions;
    for (int row = warp; row < size_; row += FinetuneSpan::warps) {
      const Storage* x = p_.support(episode_, row);
      for (int column = row; column < size_; ++column) {
        const double dot = warp_dot<double>(x, p_.support(episode_, column), dimensions);
        if (lane == 0) gram_[row * size_ + column] = gram_[column * size_ + row] = dot;
      }
      for (int c = 0; c < way_; ++c) {
        const double dot = warp_dot<double>(x, p_.first_weight(episode_, c), dimensions);
        if (lane == 0) with_weight_[c * size_ + row] = dot;
      }
    }
    for (int c = warp; c < way_; c += FinetuneSpan::warps) {
      const auto* weight = p_.first_weight(episode_, c);
      const double squares = warp_dot<double>(weight, weight, dimensions);
      if (lane != 0) continue;
      squares_[c] = squares;
      length_[c] = std::sqrt(squares);
      inverse_[c] = settings_.cosine ? inverse_norm(squares) : 1.0;
      along_[c] = speed_[c] = start_velocity_[c] = 0;
      start_weight_[c] = 1;
    }
    __syncthreads();
    for (int s = threadIdx.x; s < size_; s += threads) {
      scale_[s] = settings_.cosine ? inverse_norm(gram_[s * size_ + s]) : 1.0;
      seen_[s] = 0;
      label_[s] = static_cast<int>(p_.label(episode_, s));
    }
    __syncthreads();
    for (int k = threadIdx.x; k < size_ * size_; k += threads) gram_[k] *= scale_[k / size_] * scale_[k % size_];
    for (int k = threadIdx.x; k < way_ * size_; k += threads) {
      with_weight_[k] *= scale_[k % size_];
      with_velocity_[k] = of_weight_[k] = of_velocity_[k] = 0;
    }
    __syncthreads();
  }

  // A step of SGD on the features at begin .. begin + count - 1 of the order.
  __device__ void step(int begin, int count, bool first) {
    const SgdStep sgd = settings_.sgd_step(first);
    const double factor = sgd.taken * settings_.scale / count;
    if (way_ <= 8)
      errors_of_batch<8>(begin, count, factor);
    else
      errors_of_batch<warp_lanes>(begin, count, factor);
    __syncthreads();
    // The gradient is P + decay w with P = sum_b errors_b x_b, both times `taken` already.
    for (int c = threadIdx.x; c < way_; c += threads) {
      double decay = sgd.taken * settings_.weight_decay;
      if (settings_.cosine) {
        double with_weight = 0, with_velocity = 0;
        for (int b = 0; b < count; ++b) {
          const int s = order_[begin + b];
          with_weight += errors_[b * way_ + c] * with_weight_[c * size_ + s];
          with_velocity += errors_[b * way_ + c] * with_velocity_[c * size_ + s];
        }
        decay -= with_weight * projection(inverse_[c]);
        // w . v and v . (the old v) for the new v; what is still missing is P . v.
        const double along = along_[c];
        along_[c] = sgd.kept * along + with_weight + decay * squares_[c];
        speed_[c] = sgd.kept * speed_[c] + with_velocity + decay * along;
      }
      decay_[c] = decay;
      start_velocity_[c] = sgd.kept * start_velocity_[c] + decay * start_weight_[c];
      start_weight_[c] -= settings_.lr * start_velocity_[c];
    }
    __syncthreads();
    for (int k = threadIdx.x; k < way_ * size_; k += threads) {
      const int c = k / size_, s = k % size_, own = place_[s] - begin;
      double product = sgd.kept * with_velocity_[k] + decay_[c] * with_weight_[k];
      for (int b = 0; b < count; ++b) product += errors_[b * way_ + c] * gram_[order_[begin + b] * size_ + s];
      with_velocity_[k] = product;
      with_weight_[k] -= settings_.lr * product;
      double coefficient = sgd.kept * of_velocity_[k] + decay_[c] * of_weight_[k];
      if (own >= 0 && own < count) coefficient += errors_[own * way_ + c];
      of_velocity_[k] = coefficient;
      of_weight_[k] -= settings_.lr * coefficient;
    }
    __syncthreads();
    if (!settings_.cosine) return;
    for (int c = threadIdx.x; c < way_; c += threads) {
      double speed = sgd.kept * speed_[c] + decay_[c] * along_[c];
      for (int b = 0; b < count; ++b) speed += errors_[b * way_ + c] * with_velocity_[c * size_ + order_[begin + b]];
      squares_[c] -= settings_.lr * (2 * along_[c] - settings_.lr * speed);
      along_[c] -= settings_.lr * speed;
      speed_[c] = speed;
      inverse_[c] = inverse_norm(squares_[c]);
    }
    __syncthreads();
  }

  template <int lanes>
  __device__ __forceinline__ void errors_of_batch(int begin, int count, double factor) {
    constexpr int groups = threads / lanes;
    // Whole warps go round together, for the sums over their lanes.
    for (int first = 0; first < count; first += groups) {
      const int b = first + static_cast<int>(threadIdx.x) / lanes;
      const int s = order_[begin + min(b, count - 1)];
      class_errors<lanes>(
          way_, label_[s], settings_.scale, settings_.margin, factor,
          [&](int64_t c) { return with_weight_[c * size_ + s] * inverse_[c]; },
          [&](int64_t c, double error) {
            if (b < count) errors_[b * way_ + c] = error * inverse_[c];
          });
    }
  }

  __device__ bool sound() {
    constexpr double most = sizeof(Accumulate<Storage>) == 8 ? 32 : 0x1p24;
    int bad = 0;
    if (settings_.cosine)
      for (int c = threadIdx.x; c < way_; c += threads) {
        double total = std::abs(start_weight_[c]) * length_[c];
        for (int s = 0; s < size_; ++s) total += std::abs(of_weight_[c * size_ + s]);
        bad |= !(total * inverse_[c] <= most);
      }
    return !__syncthreads_or(bad);
  }

  __device__ void finish() {
    const int64_t dimensions = p_.problem.dimensions;
    for (int c = 0; c < way_; ++c) {
      auto* weight = p_.weight(episode_, c);
      const auto* first = p_.first_weight(episode_, c);
      const auto classifier = [&](int64_t k) {
        double sum = start_weight_[c] * double(first[k]);
        for (int s = 0; s < size_; ++s)
          sum += of_weight_[c * size_ + s] * scale_[s] * double(to_accumulate(p_.support(episode_, s)[k]));
        return sum;
      };
      double squares = 0;
      for (int64_t k = threadIdx.x; k < dimensions; k += threads) {
        const double value = classifier(k);
        weight[k] = static_cast<Accumulate<Storage>>(value);
        squares += value * value;
      }
      if (!settings_.cosine) continue;
      const double inverse = inverse_norm(block_sum<threads>(squares));
      for (int64_t k = threadIdx.x; k < dimensions; k += threads)
        weight[k] = static_cast<Accumulate<Storage>>(weight[k] * inverse);
    }
  }

  const EpisodeFinetune<Storage>& p_;
  const FinetuneSettings& settings_;
  const int64_t episode_;
  const int size_, way_, batch_;
  double* gram_;                            // [S, S]
  double *with_weight_, *with_velocity_;    // [way, S]: w . x_s and v . x_s
  double *of_weight_, *of_velocity_;        // [way, S]: coefficients of x_s
  double *start_weight_, *start_velocity_;  // [way]: coefficients of the first w
  double* scale_;                           // [S]: 1 / |x_s| or 1
  double* errors_;                          // [batch, way]
  double *squares_, *along_, *speed_;       // [way] each: |w|^2, w . v, |v|^2; for cosines alone
  double *inverse_, *decay_, *length_;      // [way]: 1 / |w| or 1; the factor of w in the gradient; |first w|
  int *seen_, *place_, *order_, *label_;    // [S] each
};

}  // namespace finetune_device

template <class Storage>
__global__ void __launch_bounds__(FinetuneSpan::threads, FinetuneSpan::blocks_of_processor)
    finetune_in_span(const __grid_constant__ EpisodeFinetune<Storage> p) {
  const bool finished = finetune_device::SpanTraining<Storage>(p, blockIdx.x, dynamic_shared<double>()).run();
  if (threadIdx.x == 0) p.finished[blockIdx.x] = finished;
}

}  // namespace fewshot_ext
