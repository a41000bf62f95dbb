#include "common/memory.h"

#include <new>
#include <utility>

namespace fewshot_ext {
namespace {

constexpr std::align_val_t cache_line{64};
constexpr size_t kept_at_most = size_t(32) << 20;

struct Kept {
  void* data = nullptr;
  size_t bytes = 0;
  ~Kept() { ::operator delete(data, cache_line); }
};
thread_local Kept kept;

}  // namespace

Workspace::Workspace(size_t bytes) : data_(nullptr), bytes_(bytes) {
  if (kept.bytes >= bytes) {
    data_ = std::exchange(kept.data, nullptr);
    bytes_ = std::exchange(kept.bytes, 0);
  }
  if (!data_) data_ = ::operator new(bytes_, cache_line);
}

Workspace::~Workspace() {
  if (bytes_ <= kept_at_most && bytes_ > kept.bytes) {
    std::swap(kept.data, data_);
    std::swap(kept.bytes, bytes_);
  }
  ::operator delete(data_, cache_line);
}

}  // namespace fewshot_ext
