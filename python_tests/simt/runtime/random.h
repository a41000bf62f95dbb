// SplitMix64: the same schedule from the same seed on every machine.
#pragma once

#include <cstdint>
#include <utility>

namespace simt {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t operator()() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  uint64_t below(uint64_t bound) { return (*this)() % bound; }

  template <class Sequence>
  void shuffle(Sequence& sequence) {
    for (uint64_t i = sequence.size(); i > 1; --i) std::swap(sequence[i - 1], sequence[below(i)]);
  }

 private:
  uint64_t state_;
};

}  // namespace simt
