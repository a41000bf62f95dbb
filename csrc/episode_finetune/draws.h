// Random first classifiers and orders, the same on every device: integers hashed from a seed and a position, as
// counter-based generators have them.
#pragma once

#include <cstdint>

#include "common/half.h"

namespace fewshot_ext {

// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): any change of its input changes half of its output bits.
FEWSHOT_EXT_HOST_DEVICE inline uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The numbers of one stream of a seed, by their index: SplitMix64 from a start of its own.
struct RandomStream {
  uint64_t start;

  FEWSHOT_EXT_HOST_DEVICE RandomStream(uint64_t seed, uint64_t stream) : start(mix_bits(mix_bits(seed) ^ stream)) {}

  FEWSHOT_EXT_HOST_DEVICE uint32_t bits(uint64_t index) const {
    return static_cast<uint32_t>(mix_bits(start + (index + 1) * 0x9e3779b97f4a7c15u) >> 32);
  }

  // One of 0 .. count - 1, for count < 2^31: each as likely as the others up to 2^-32.
  FEWSHOT_EXT_HOST_DEVICE int64_t below(uint64_t index, int64_t count) const {
    return static_cast<int64_t>((uint64_t(bits(index)) * static_cast<uint64_t>(count)) >> 32);
  }

  // Uniform in (-bound, bound): odd multiples of 2^-24. One rounding, so that all devices have the same.
  template <class T>
  FEWSHOT_EXT_HOST_DEVICE T symmetric(uint64_t index, T bound) const {
    const auto odd = static_cast<int32_t>(bits(index) >> 8) * 2 - ((1 << 24) - 1);
    return T(odd) * (bound * T(0x1p-24));
  }
};

struct EpisodeDraws {
  uint64_t seed = 0;
  int64_t episodes = 0, way = 0, dimensions = 0, passes = 0, support_size = 0;
  void* weight = nullptr;    // [E, way, D], float or double
  int64_t* order = nullptr;  // [E, passes, S]

  // Of the weights of an episode; those of its orders follow.
  FEWSHOT_EXT_HOST_DEVICE RandomStream weights(int64_t episode) const { return stream(episode, 0); }

  // A permutation of 0 .. S - 1, by Fisher and Yates, built from the inside out.
  FEWSHOT_EXT_HOST_DEVICE void draw_order(int64_t episode, int64_t pass) const {
    const RandomStream random = stream(episode, pass + 1);
    int64_t* to = order + (episode * passes + pass) * support_size;
    for (int64_t k = 0; k < support_size; ++k) {
      const int64_t other = random.below(static_cast<uint64_t>(k), k + 1);
      to[k] = to[other];
      to[other] = k;
    }
  }

 private:
  FEWSHOT_EXT_HOST_DEVICE RandomStream stream(int64_t episode, int64_t index) const {
    return {seed, mix_bits(static_cast<uint64_t>(episode) + 1) + static_cast<uint64_t>(index)};
  }
};

}  // namespace fewshot_ext
