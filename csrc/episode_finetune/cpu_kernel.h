// Fine-tuning of episodes on the CPU, an episode at a time on each thread and all that its steps touch in the caches.
// Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
#pragma once

#include "common/long_rows.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "episode_finetune/cpu_direct.h"
#include "episode_finetune/cpu_span.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

// One thread's memory for an episode, used again for the next.
template <class Storage, class T, class Training>
class EpisodeWorker {
  using Problem = EpisodeFinetuneProblem<Storage, T>;
  using Direct = DirectTraining<T, 0>;
  static constexpr bool converts = !std::is_same_v<Storage, T>;
  // Times the rounding of double, it is far below that of float32 or about that of double.
  static constexpr double largest_share = std::is_same_v<T, double> ? 32 : 0x1p24;

 public:
  EpisodeWorker(const Problem& problem, const Training& training)
      : problem_(problem),
        training_(training),
        direct_(problem.settings, problem.support_size, problem.way, problem.dimensions) {
    ByteArena sizes{};
    lay_out(sizes);
    workspace_.emplace(static_cast<size_t>(sizes.bytes.used));
    ByteArena arena{{static_cast<unsigned char*>(workspace_->data())}};
    lay_out(arena);
  }

  void run(int64_t episode) {
    const Problem& p = problem_;
    const Storage* support = p.support + episode * p.support_strides[0];
    const T* weight = p.weight + episode * p.way * p.dimensions;
    for (int64_t s = 0; s < p.support_size; ++s)
      vectors_[s] = row(support + s * p.support_strides[1], support_ + s * p.dimensions);
    for (int64_t c = 0; c < p.way; ++c) {
      // Of w = c w', the gradient by w' is that of a cosine by w' over c^2.
      T scale = 1;
      vectors_[p.support_size + c] = shortened(weight + c * p.dimensions, first_ + c * p.dimensions, &scale);
      shrink_[c] = scale * scale;
    }
    std::copy_n(p.target + episode * p.support_size, p.support_size, labels_);

    if (train(training_, episode)) {
      finish(training_);
    } else {
      train(direct_, episode);
      finish(direct_);
    }
    score(episode);
  }

 private:
  void lay_out(ByteArena& arena) {
    const Problem& p = problem_;
    training_.lay_out(arena);
    if constexpr (!std::is_same_v<Training, Direct>) direct_.lay_out(arena);
    vectors_ = arena.take<const T*>(p.support_size + p.way);
    support_ = arena.take<T>(p.support_size * p.dimensions);
    query_ = arena.take<T>(dot_rows * p.dimensions);
    first_ = arena.take<T>(p.way * p.dimensions);
    shrink_ = arena.take<T>(p.way);
    labels_ = arena.take<int32_t>(p.support_size);
    order_ = arena.take<int32_t>(p.support_size);
    weight_ = arena.take<T>(p.way * p.dimensions);
    classifiers_ = arena.take<const T*>(p.way);
    trained_ = arena.take<double>(p.dimensions);
  }

  const T* row(const Storage* from, T* memory) const {
    if constexpr (converts) {
      for (int64_t k = 0; k < problem_.dimensions; ++k) memory[k] = to_accumulate(from[k]);
      return shortened(memory, memory);
    } else {
      return shortened(from, memory);
    }
  }

  // Where cosines want a long row: in `memory`, times the scale that it has been given.
  const T* shortened(const T* from, T* memory, T* scale = nullptr) const {
    const int64_t dimensions = problem_.dimensions;
    if (!problem_.settings.cosine || !is_long(squared_norm<T>(from, dimensions))) return from;
    const T factor = scale_of_long_row<T>(from, dimensions);
    for (int64_t k = 0; k < dimensions; ++k) memory[k] = factor * from[k];
    if (scale) *scale = factor;
    return memory;
  }

  // False if the training gives up.
  template <class AnyTraining>
  bool train(AnyTraining& training, int64_t episode) {
    const Problem& p = problem_;
    training.start(vectors_, p.dimensions, shrink_);
    const int64_t* order = p.order + episode * p.passes * p.support_size;
    for (int64_t pass = 0; pass < p.passes; ++pass, order += p.support_size) {
      std::copy_n(order, p.support_size, order_);
      if (!training.pass(order_, labels_, pass == 0, largest_share)) return false;
    }
    return true;
  }

  template <class AnyTraining>
  void finish(AnyTraining& training) {
    const Problem& p = problem_;
    for (int64_t c = 0; c < p.way; ++c) {
      training.finish(vectors_, p.dimensions, c, trained_);
      const double scale = p.settings.cosine ? inverse_norm(squared_norm<double>(trained_, p.dimensions)) : 1.0;
      T* weight = weight_ + c * p.dimensions;
      for (int64_t k = 0; k < p.dimensions; ++k) weight[k] = T(trained_[k] * scale);
      classifiers_[c] = weight;
    }
  }

  void score(int64_t episode) const {
    const Problem& p = problem_;
    const Storage* query = p.query + episode * p.query_strides[0];
    T* scores = p.scores + episode * p.query_size * p.way;
    for (int64_t first = 0; first < p.query_size; first += dot_rows) {
      const int64_t count = std::min<int64_t>(dot_rows, p.query_size - first);
      const T* images[dot_rows];
      T scale[dot_rows];
      for (int64_t m = 0; m < count; ++m) {
        images[m] = row(query + (first + m) * p.query_strides[1], query_ + m * p.dimensions);
        scale[m] = p.settings.cosine ? inverse_norm(squared_norm<T>(images[m], p.dimensions)) : T(1);
      }
      each_dot<T>(images, count, classifiers_, p.way, p.dimensions,
                  [&](int64_t m, int64_t c, T dot) { scores[(first + m) * p.way + c] = dot * scale[m]; });
    }
  }

  const Problem& problem_;
  Training training_;
  Direct direct_;  // for episodes that the other gives up
  std::optional<Workspace> workspace_;
  const T** vectors_;         // [S + way]: the support, the first classifiers
  T *support_, *query_;       // converted, or shortened
  T *first_, *shrink_;        // [way, D], [way]: first classifiers that were shortened, and their gradients' factor
  int32_t *labels_, *order_;  // [S]
  T* weight_;                 // [way, D], trained, normalized for cosines
  const T** classifiers_;     // [way]
  double* trained_;           // [D]
};

template <class Storage, class T, class Training>
void run_episodes(const EpisodeFinetuneProblem<Storage, T>& problem, const Training& training) {
  const int64_t threads = std::min(available_threads(), problem.episodes);
  std::atomic<int64_t> next{0};
  parallel_tasks(threads, [&](int64_t) {
    EpisodeWorker<Storage, T, Training> worker(problem, training);
    for (;;) {
      const int64_t episode = next.fetch_add(1, std::memory_order_relaxed);
      if (episode >= problem.episodes) return;
      worker.run(episode);
    }
  });
}

// The vector operations of a step in both forms, with its share of the Gram matrix, and a few operations for what is
// not vectors: fitted to measurements from 5 to 400 features, 64 to 1600 dimensions and 5 to 64 classes.
template <class T>
bool span_pays(int64_t support_size, int64_t way, int64_t dimensions, int64_t batch_size, int64_t passes) {
  const auto vectors = [](int64_t count, int lanes) { return (count + lanes - 1) / lanes; };
  const int64_t batch = std::min(batch_size, support_size);
  const int64_t gram = support_size * batch * dimensions / (2 * Simd<double>::lanes * std::max<int64_t>(passes, 1));
  const int64_t span = gram + support_size * vectors(way, Simd<double>::lanes) * (batch + 10);
  const int64_t direct = way * (vectors(dimensions, Simd<T>::lanes) * (2 * batch + 8) + 12 * batch);
  return span <= direct;
}

template <class Storage, class T>
void finetune_episodes(const EpisodeFinetuneProblem<Storage, T>& p, FinetuneForm form) {
  const bool span = form == FinetuneForm::automatic
                        ? span_pays<T>(p.support_size, p.way, p.dimensions, p.settings.batch_size, p.passes)
                        : form == FinetuneForm::span;
  if (!span) return run_episodes(p, DirectTraining<T, 0>(p.settings, p.support_size, p.way, p.dimensions));
  const int64_t vectors = ClassRows<double, 0>(p.way).vectors();
  if (vectors == 1) return run_episodes(p, SpanTraining<1>(p.settings, p.support_size, p.way));
  if (vectors == 2) return run_episodes(p, SpanTraining<2>(p.settings, p.support_size, p.way));
  return run_episodes(p, SpanTraining<0>(p.settings, p.support_size, p.way));
}

template void finetune_episodes(const EpisodeFinetuneProblem<float, float>&, FinetuneForm);
template void finetune_episodes(const EpisodeFinetuneProblem<double, double>&, FinetuneForm);
template void finetune_episodes(const EpisodeFinetuneProblem<BFloat16, float>&, FinetuneForm);
template void finetune_episodes(const EpisodeFinetuneProblem<Float16, float>&, FinetuneForm);

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
