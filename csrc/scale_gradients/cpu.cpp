// scale_gradients_ on the CPU.
#include <algorithm>
#include <type_traits>

#include "common/parallel.h"
#include "scale_gradients/tensors.h"

namespace fewshot_ext {
namespace {

struct CpuKernels {
  template <class Storage>
  static void run(void* const* gradients, const int64_t* counts, const void* by, const torch::stable::Tensor&) {
    using T = std::conditional_t<std::is_same_v<Storage, double>, double, float>;
    constexpr int64_t enough_for_a_thread = 1 << 15;
    const T factor = *static_cast<const T*>(by);
    if (factor == T(1)) return;
    for (int which = 0; which < 2; ++which) {
      Storage* values = static_cast<Storage*>(gradients[which]);
      const int64_t count = counts[which];
      const int64_t tasks = std::clamp<int64_t>(count / enough_for_a_thread, 1, available_threads());
      parallel_tasks(tasks, [=](int64_t task) {
        for (int64_t k = count * task / tasks; k < count * (task + 1) / tasks; ++k)
          values[k] = from_accumulate<Storage>(to_accumulate(values[k]) * factor);
      });
    }
  }
};

}  // namespace
}  // namespace fewshot_ext

STABLE_TORCH_LIBRARY_IMPL(fewshot_ext, CPU, m) {
  using namespace fewshot_ext;
  m.impl("scale_gradients_", FEWSHOT_EXT_KERNEL(&scale_gradients_tensors::scale_gradients<CpuKernels>));
}
