// The asynchronous copies of a thread, from their issue until it has waited for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "runtime/random.h"
#include "simt/runtime.h"

namespace simt {

struct AsyncCopy {
  static constexpr size_t width = 16;  // bytes of shared memory, the only size that cp.async.cg has

  std::byte* to;
  const void* from;
  size_t bytes;  // to read; the rest becomes zero
  Location where;
  uint64_t group = 0;
  bool done = false;

  void run() {
    if (done) return;
    done = true;
    std::memcpy(to, from, bytes);
    std::memset(to + bytes, 0, width - bytes);
  }
};

class AsyncCopies {
 public:
  bool empty() const { return copies_.empty(); }
  const AsyncCopy& first() const { return copies_.front(); }

  void clear() {
    copies_.clear();
    group_ = 0;
  }

  void issue(AsyncCopy copy) {
    copy.group = group_;
    copies_.push_back(copy);
  }

  void commit() { ++group_; }

  // What the hardware may do whenever it likes.
  void run_some(Random& random) {
    for (AsyncCopy& copy : copies_)
      if (!copy.done && random.below(2) == 0) copy.run();
  }

  // Takes out, and runs where that is still to be done, all but the last `pending` groups and what is in none yet.
  std::vector<AsyncCopy> finish(uint64_t pending) {
    std::vector<AsyncCopy> finished;
    while (!copies_.empty() && copies_.front().group + pending < group_) {
      copies_.front().run();
      finished.push_back(copies_.front());
      copies_.erase(copies_.begin());
    }
    return finished;
  }

  // The one that is to write any of these bytes.
  const AsyncCopy* find(const void* address, size_t bytes) const {
    const auto* begin = static_cast<const std::byte*>(address);
    for (const AsyncCopy& copy : copies_)
      if (begin < copy.to + AsyncCopy::width && copy.to < begin + bytes) return &copy;
    return nullptr;
  }

 private:
  std::vector<AsyncCopy> copies_;  // in the order of their issue, so that groups ascend
  uint64_t group_ = 0;             // that the next copy goes into
};

}  // namespace simt
