// Memory that kernels work in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/host_device.h"

namespace fewshot_ext {

// Scratch memory for one call, aligned to a cache line. The calling thread keeps up to 32 MiB of it for its next call:
// at few-shot sizes the page faults of fresh memory would take as long as the arithmetic.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  size_t bytes_;
};

// Hands out parts of one piece of memory, each from a cache line of its own. Without a base it adds up what is needed.
template <class T>
struct Arena {
  T* base = nullptr;
  int64_t used = 0;

  FEWSHOT_EXT_HOST_DEVICE T* take(int64_t count) {
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
    T* at = base ? base + used : nullptr;
    used += (count + line - 1) / line * line;
    return at;
  }
};

// Parts of one piece of memory for arrays of any type.
struct ByteArena {
  Arena<unsigned char> bytes;

  template <class T>
  FEWSHOT_EXT_HOST_DEVICE T* take(int64_t count) {
    return reinterpret_cast<T*>(bytes.take(count * static_cast<int64_t>(sizeof(T))));
  }
};

}  // namespace fewshot_ext
