// Multiplies gradients by the upstream gradient of a scalar loss, in place. That is 1 as a rule, and only the GPU
// knows: reading it on the host would make the host wait, and multiplying regardless would move the whole gradient
// twice.
#pragma once

#include <algorithm>

#include "common/four.cuh"

namespace fewshot_ext {

template <class Storage>
struct ScaleGradients {
  using T = Accumulate<Storage>;
  Storage* gradients[2];  // contiguous
  int64_t counts[2];
  bool fours[2];    // whether they are aligned for it
  const T* factor;  // []
};

struct ScaleGradientsLaunch {
  static constexpr int threads = 256;
  static constexpr int64_t most_blocks = 1024;  // few enough to come and go in no time where there is nothing to do
};

template <class Storage>
__global__ void __launch_bounds__(ScaleGradientsLaunch::threads) scale_gradients(ScaleGradients<Storage> p) {
  using T = Accumulate<Storage>;
  const T factor = *p.factor;
  if (factor == T(1)) return;
  const int64_t step = int64_t(gridDim.x) * ScaleGradientsLaunch::threads * 4;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int64_t count = p.counts[which];
    for (int64_t k = 4 * (int64_t(blockIdx.x) * ScaleGradientsLaunch::threads + threadIdx.x); k < count; k += step) {
      const bool fours = p.fours[which] && k + 4 <= count;
      Four<T> values = load_four(p.gradients[which] + k, count - k, fours);
#pragma unroll
      for (int c = 0; c < 4; ++c) values.at[c] *= factor;
      store_four(p.gradients[which] + k, values, count - k, fours);
    }
  }
}

template <class Storage, class Device>
void scale_gradients_on_gpu(Device& device, void* const* gradients, const int64_t* counts, const void* factor) {
  ScaleGradients<Storage> p{};
  for (int which = 0; which < 2; ++which) {
    p.gradients[which] = static_cast<Storage*>(gradients[which]);
    p.counts[which] = counts[which];
    p.fours[which] = in_fours<Storage>(gradients[which], 4, 4);
  }
  p.factor = static_cast<const Accumulate<Storage>*>(factor);
  constexpr int64_t each = 4 * ScaleGradientsLaunch::threads;
  const int64_t blocks = (std::max(counts[0], counts[1]) + each - 1) / each;
  if (blocks == 0) return;
  device.template launch<scale_gradients<Storage>>(
      static_cast<unsigned>(std::min(blocks, ScaleGradientsLaunch::most_blocks)), ScaleGradientsLaunch::threads, p);
}

}  // namespace fewshot_ext
