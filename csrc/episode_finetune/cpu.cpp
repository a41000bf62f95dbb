// Fine-tuning of episodes on the CPU: labels and orders looked at, and the version for this processor called.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "episode_finetune/tensors.h"

namespace fewshot_ext {

namespace baseline {
template <class Storage, class Accumulate>
void finetune_episodes(const EpisodeFinetuneProblem<Storage, Accumulate>& problem, FinetuneForm form);
}
namespace avx2 {
template <class Storage, class Accumulate>
void finetune_episodes(const EpisodeFinetuneProblem<Storage, Accumulate>& problem, FinetuneForm form);
}
namespace avx512 {
template <class Storage, class Accumulate>
void finetune_episodes(const EpisodeFinetuneProblem<Storage, Accumulate>& problem, FinetuneForm form);
}

namespace {

bool labels_in_range(const int64_t* labels, int64_t count, int64_t way) {
  return std::all_of(labels, labels + count, [way](int64_t label) { return label >= 0 && label < way; });
}

// Whether each of `rows` rows holds every number below `length` once. `seen` is scratch, [length].
bool are_permutations(const int64_t* row, int64_t rows, int64_t length, int64_t* seen) {
  std::fill(seen, seen + length, int64_t(0));
  for (int64_t stamp = 1; stamp <= rows; ++stamp, row += length)
    for (int64_t k = 0; k < length; ++k) {
      if (row[k] < 0 || row[k] >= length || seen[row[k]] == stamp) return false;
      seen[row[k]] = stamp;
    }
  return true;
}

// Raises for any episode at fault, before the first is trained.
template <class Storage, class Accumulate>
void check_values(const EpisodeFinetuneProblem<Storage, Accumulate>& p) {
  const int64_t tasks = std::min(available_threads(), p.episodes);
  std::atomic<int64_t> bad_labels{p.episodes}, bad_orders{p.episodes};  // the first episode at fault
  const auto note = [](std::atomic<int64_t>& first, int64_t episode) {
    int64_t before = first;
    while (episode < before && !first.compare_exchange_weak(before, episode)) {
    }
  };
  parallel_tasks(tasks, [&](int64_t task) {
    std::vector<int64_t> seen(p.support_size);
    for (int64_t e = p.episodes * task / tasks; e < p.episodes * (task + 1) / tasks; ++e) {
      if (!labels_in_range(p.target + e * p.support_size, p.support_size, p.way)) note(bad_labels, e);
      if (!are_permutations(p.order + e * p.passes * p.support_size, p.passes, p.support_size, seen.data()))
        note(bad_orders, e);
    }
  });
  STD_TORCH_CHECK(bad_labels == p.episodes, "support_target: expected labels in [0, ", p.way, "); episode ",
                  bad_labels.load(), " has another");
  STD_TORCH_CHECK(bad_orders == p.episodes, "order: expected rows that are permutations of 0 .. ", p.support_size - 1,
                  "; episode ", bad_orders.load(), " has another");
}

template <class Storage, class Accumulate>
void finetune_episodes(const EpisodeFinetuneProblem<Storage, Accumulate>& problem, FinetuneForm form) {
#if defined(__x86_64__)
  switch (cpu_capability()) {
    case CpuCapability::avx512:
      return avx512::finetune_episodes(problem, form);
    case CpuCapability::avx2:
      return avx2::finetune_episodes(problem, form);
    case CpuCapability::baseline:
      break;
  }
#endif
  baseline::finetune_episodes(problem, form);
}

struct CpuKernels {
  template <class Storage, class Accumulate>
  static void run(const EpisodeFinetuneProblem<Storage, Accumulate>& problem, const torch::stable::Tensor&) {
    const FinetuneForm form = episode_finetune_tensors::form_by_environment();
    check_values(problem);
    finetune_episodes(problem, form);
  }

  template <class Accumulate>
  static void draw(const EpisodeDraws& draws, const torch::stable::Tensor&) {
    const auto bound = Accumulate(1 / std::sqrt(double(draws.dimensions)));
    const int64_t tasks = std::min(available_threads(), draws.episodes), count = draws.way * draws.dimensions;
    parallel_tasks(tasks, [&](int64_t task) {
      for (int64_t e = draws.episodes * task / tasks; e < draws.episodes * (task + 1) / tasks; ++e) {
        const RandomStream random = draws.weights(e);
        Accumulate* weight = static_cast<Accumulate*>(draws.weight) + e * count;
        for (int64_t k = 0; k < count; ++k) weight[k] = random.symmetric(static_cast<uint64_t>(k), bound);
        for (int64_t pass = 0; pass < draws.passes; ++pass) draws.draw_order(e, pass);
      }
    });
  }
};

}  // namespace
}  // namespace fewshot_ext

STABLE_TORCH_LIBRARY_IMPL(fewshot_ext, CPU, m) {
  using namespace fewshot_ext;
  m.impl("finetune_episodes", FEWSHOT_EXT_KERNEL(&episode_finetune_tensors::finetune<CpuKernels>));
  m.impl("draw_episodes", FEWSHOT_EXT_KERNEL(&episode_finetune_tensors::draw<CpuKernels>));
}
