#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace fewshot_ext {

int64_t available_threads() { return torch::stable::get_num_threads(); }

void parallel_tasks(int64_t tasks, void (*run)(int64_t, void*), void* context) {
  if (tasks == 1) {  // not worth waking the pool
    run(0, context);
    return;
  }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) run(task, context);
  });
}

}  // namespace fewshot_ext
