// The launches of episode fine-tuning on a GPU, written against a Device so that the emulator runs the same code;
// margin_softmax/gpu.h says what a Device offers.
#pragma once

#include "episode_finetune/direct.cuh"
#include "episode_finetune/span.cuh"

namespace fewshot_ext {

template <class Storage, class Device>
void finetune_episodes_on_gpu(Device& device, const EpisodeFinetuneProblem<Storage, Accumulate<Storage>>& problem,
                              FinetuneForm form) {
  using T = Accumulate<Storage>;
  const int64_t episodes = problem.episodes, size = problem.support_size, way = problem.way;
  const int64_t batch = std::min(problem.settings.batch_size, size);
  const auto allocate = [&device](auto* kind, int64_t count) {
    return reinterpret_cast<decltype(kind)>(device.allocate(count * static_cast<int64_t>(sizeof(*kind))));
  };
  EpisodeFinetune<Storage> p{};
  p.problem = problem;
  p.trained = allocate(static_cast<T*>(nullptr), episodes * way * problem.dimensions);
  p.velocity = allocate(static_cast<T*>(nullptr), episodes * way * problem.dimensions);
  p.errors = allocate(static_cast<T*>(nullptr), episodes * 2 * batch * way);
  p.inverse = allocate(static_cast<T*>(nullptr), episodes * (size + way));
  p.seen = allocate(static_cast<int*>(nullptr), episodes * size);

  const auto blocks = static_cast<unsigned>(episodes);
  if (form != FinetuneForm::direct && FinetuneSpan::takes(size, way, problem.settings.batch_size)) {
    p.finished = allocate(static_cast<bool*>(nullptr), episodes);
    const int64_t bytes = FinetuneSpan::bytes(size, way, problem.settings.batch_size);
    device.template launch_with_shared<finetune_in_span<Storage>>(blocks, FinetuneSpan::threads, bytes, p);
  }
  device.template launch<finetune_directly<Storage>>(blocks, FinetuneDirect::threads, p);
  const int64_t queries = episodes * problem.query_size;
  if (queries == 0) return;
  device.template launch<finetune_score_queries<Storage>>(
      static_cast<unsigned>((queries + ScoreQueries::warps - 1) / ScoreQueries::warps), ScoreQueries::threads, p);
}

template <class T, class Device>
void draw_episodes_on_gpu(Device& device, const EpisodeDraws& draws) {
  const auto blocks = [](int64_t threads) {
    return static_cast<unsigned>((threads + DrawEpisodes::threads - 1) / DrawEpisodes::threads);
  };
  const int64_t weights = draws.episodes * draws.way * draws.dimensions, orders = draws.episodes * draws.passes;
  if (weights > 0) {
    const auto bound = static_cast<T>(1 / std::sqrt(static_cast<double>(draws.dimensions)));
    device.template launch<draw_first_weights<T>>(blocks(weights), DrawEpisodes::threads, draws, bound);
  }
  if (orders > 0) device.template launch<draw_orders>(blocks(orders), DrawEpisodes::threads, draws);
}

}  // namespace fewshot_ext
