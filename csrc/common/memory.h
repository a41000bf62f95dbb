// Memory that kernels work in.
#pragma once

#include <cstddef>

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

}  // namespace fewshot_ext
