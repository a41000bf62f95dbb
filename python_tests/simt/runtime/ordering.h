// Which accesses to shared memory barriers put in order: an epoch a block, a vector clock a lane in its warp.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "simt/runtime.h"

namespace simt {

struct Access {
  uint32_t epoch = 0;  // 0: never happened
  uint32_t clock = 0;
  uint16_t thread = 0;
  bool atomic = false;
  bool pending = false;  // an asynchronous copy that has not been waited for
};

class Ordering {
 public:
  void begin_block(unsigned threads) {
    first_epoch_ = ++epoch_;
    clock_.assign(threads, 1);
    seen_.assign(threads, {});
  }

  void block_barrier() { ++epoch_; }

  void warp_barrier(unsigned warp, uint32_t mask) {
    const unsigned first = warp * warp_lanes;
    Clocks joined{};
    for_each_lane(mask, [&](unsigned lane) {
      for (unsigned other = 0; other < warp_lanes; ++other)
        joined[other] = std::max(joined[other], seen_[first + lane][other]);
    });
    for_each_lane(mask, [&](unsigned lane) { joined[lane] = clock_[first + lane]++; });
    for_each_lane(mask, [&](unsigned lane) { seen_[first + lane] = joined; });
  }

  Access now(unsigned thread, bool atomic) const {
    return {epoch_, clock_[thread], static_cast<uint16_t>(thread), atomic};
  }

  bool in_this_block(const Access& access) const { return access.epoch >= first_epoch_; }

  // Whether what `thread` does now comes after the access on every schedule.
  bool precedes(const Access& access, unsigned thread) const {
    if (access.epoch < epoch_ || access.thread == thread) return true;
    return access.thread / warp_lanes == thread / warp_lanes &&
           access.clock <= seen_[thread][access.thread % warp_lanes];
  }

 private:
  using Clocks = std::array<uint32_t, warp_lanes>;

  template <class Function>
  static void for_each_lane(uint32_t mask, Function function) {
    for (unsigned lane = 0; lane < warp_lanes; ++lane)
      if (mask >> lane & 1u) function(lane);
  }

  uint32_t epoch_ = 0;  // goes on from block to block, so that old records expire by themselves
  uint32_t first_epoch_ = 1;
  std::vector<uint32_t> clock_;  // a thread's own time, which its warp barriers advance
  std::vector<Clocks> seen_;     // up to which time of each lane of its warp a thread knows what happened
};

}  // namespace simt
