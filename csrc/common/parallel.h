// Threads from torch's own pool, so that torch.set_num_threads holds for these kernels too.
#pragma once

#include <cstdint>

namespace fewshot_ext {

int64_t available_threads();

// Calls run(task, context) for every task in [0, tasks), each task on a thread of its own where there are enough.
void parallel_tasks(int64_t tasks, void (*run)(int64_t task, void* context), void* context);

template <class Function>
void parallel_tasks(int64_t tasks, const Function& function) {
  parallel_tasks(
      tasks, [](int64_t task, void* context) { (*static_cast<const Function*>(context))(task); },
      const_cast<void*>(static_cast<const void*>(&function)));
}

}  // namespace fewshot_ext
