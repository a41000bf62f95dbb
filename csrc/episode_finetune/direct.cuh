// Training on the vectors themselves, a block for each episode: for supports whose Gram matrix does not fit, and for
// episodes that the training in the span gives up.
#pragma once

#include "episode_finetune/kernels.cuh"

namespace fewshot_ext {

struct FinetuneDirect {
  static constexpr int threads = 256, warps = threads / warp_lanes;
  static constexpr int blocks_of_processor = 2;  // 128 registers a thread
};

namespace finetune_device {

template <class Storage>
class DirectTraining {
  using T = Accumulate<Storage>;
  static constexpr int threads = FinetuneDirect::threads, warps = FinetuneDirect::warps;

 public:
  __device__ DirectTraining(const EpisodeFinetune<Storage>& p, int64_t episode)
      : p_(p),
        settings_(p.problem.settings),
        episode_(episode),
        size_(p.problem.support_size),
        way_(p.problem.way),
        dimensions_(p.problem.dimensions),
        batch_(min(p.problem.settings.batch_size, p.problem.support_size)),
        velocity_(p.velocity + episode * way_ * dimensions_),
        similarities_(p.errors + episode * 2 * batch_ * way_),
        errors_(similarities_ + batch_ * way_),
        inverse_image_(p.inverse + episode * (size_ + way_)),
        inverse_(inverse_image_ + size_),
        seen_(p.seen + episode * size_) {}

  __device__ __forceinline__ void run() {
    if (!labels_in_range(p_, episode_)) return poison(p_, episode_);
    start();
    for (int64_t pass = 0; pass < p_.problem.passes; ++pass) {
      const int64_t* order = p_.order(episode_, pass);
      if (!is_permutation(order, size_, static_cast<int>(pass) + 1, seen_)) return poison(p_, episode_);
      for (int64_t begin = 0; begin < size_; begin += batch_)
        step(order + begin, min(batch_, size_ - begin), pass == 0 && begin == 0);
    }
    if (!settings_.cosine) return;
    for (int64_t c = 0; c < way_; ++c)
      for (int64_t k = threadIdx.x; k < dimensions_; k += threads) p_.weight(episode_, c)[k] *= inverse_[c];
  }

 private:
  __device__ __forceinline__ int warp() const { return static_cast<int>(threadIdx.x) / warp_lanes; }
  __device__ __forceinline__ int lane() const { return static_cast<int>(threadIdx.x) % warp_lanes; }

  __device__ __forceinline__ void start() {
    for (int64_t row = warp(); row < size_ + way_; row += warps) {
      T inverse = 1;
      if (settings_.cosine) {
        const T* weight = row < size_ ? nullptr : p_.first_weight(episode_, row - size_);
        const Storage* image = row < size_ ? p_.support(episode_, row) : nullptr;
        inverse = inverse_norm(weight == nullptr ? warp_dot<T>(image, image, dimensions_)
                                                 : warp_dot<T>(weight, weight, dimensions_));
      }
      if (lane() == 0) inverse_image_[row] = inverse;
    }
    for (int64_t s = threadIdx.x; s < size_; s += threads) seen_[s] = 0;
    for (int64_t k = threadIdx.x; k < way_ * dimensions_; k += threads) {
      p_.weight(episode_, 0)[k] = p_.first_weight(episode_, 0)[k];
      velocity_[k] = 0;
    }
    __syncthreads();
  }

  // A step of SGD on `count` support vectors.
  __device__ __forceinline__ void step(const int64_t* batch, int64_t count, bool first) {
    const SgdStep sgd = settings_.sgd_step(first);
    for (int64_t index = warp(); index < count * way_; index += warps) {
      const int64_t s = batch[index / way_], c = index % way_;
      const T dot = warp_dot<T>(p_.support(episode_, s), p_.weight(episode_, c), dimensions_);
      if (lane() == 0) similarities_[index] = dot * inverse_image_[s] * inverse_[c];
    }
    __syncthreads();
    const T factor = static_cast<T>(sgd.taken * settings_.scale / static_cast<double>(count));
    for (int64_t b = warp(); b < count; b += warps)
      class_errors<warp_lanes>(
          way_, p_.label(episode_, batch[b]), static_cast<T>(settings_.scale), static_cast<T>(settings_.margin), factor,
          [&](int64_t c) { return similarities_[b * way_ + c]; },
          [&](int64_t c, T error) { errors_[b * way_ + c] = error; });
    __syncthreads();
    for (int64_t c = 0; c < way_; ++c) {
      T decay = static_cast<T>(sgd.taken * settings_.weight_decay);
      // d cos(w, x) / d w = (x - cos(w, x) w / |w|) / |w| for unit x: its second part decays w.
      T along = 0;
      for (int64_t b = 0; b < count; ++b) along += errors_[b * way_ + c] * similarities_[b * way_ + c];
      if (settings_.cosine) decay -= along * projection(inverse_[c]);
      const T squares = move(c, batch, count, static_cast<T>(sgd.kept), decay);
      if (!settings_.cosine) continue;
      const T inverse = inverse_norm(block_sum<threads>(squares));
      if (threadIdx.x == 0) inverse_[c] = inverse;
    }
    __syncthreads();
  }

  // v = kept v + decay w + sum_b errors_b x_b, w -= lr v; the thread's part of |w|^2.
  __device__ __forceinline__ T move(int64_t c, const int64_t* batch, int64_t count, T kept, T decay) {
    const T lr = static_cast<T>(settings_.lr), inverse = inverse_[c];
    T* weight = p_.weight(episode_, c);
    T* velocity = velocity_ + c * dimensions_;
    T squares = 0;
    for (int64_t k = threadIdx.x; k < dimensions_; k += threads) {
      T moved = kept * velocity[k] + decay * weight[k];
      for (int64_t b = 0; b < count; ++b) {
        const int64_t s = batch[b];
        moved += errors_[b * way_ + c] * inverse * inverse_image_[s] * to_accumulate(p_.support(episode_, s)[k]);
      }
      velocity[k] = moved;
      weight[k] -= lr * moved;
      squares += weight[k] * weight[k];
    }
    return squares;
  }

  const EpisodeFinetune<Storage>& p_;
  const FinetuneSettings& settings_;
  const int64_t episode_, size_, way_, dimensions_, batch_;
  T* velocity_;                  // [way, D]
  T *similarities_, *errors_;    // [batch, way]
  T *inverse_image_, *inverse_;  // [S], [way]: 1 / |x_s| and 1 / |w_c|, or 1
  int* seen_;                    // [S]
};

}  // namespace finetune_device

template <class Storage>
__global__ void __launch_bounds__(FinetuneDirect::threads, FinetuneDirect::blocks_of_processor)
    finetune_directly(const __grid_constant__ EpisodeFinetune<Storage> p) {
  if (p.finished != nullptr && p.finished[blockIdx.x]) return;
  finetune_device::DirectTraining<Storage>(p, blockIdx.x).run();
}

}  // namespace fewshot_ext
