#include "runtime/shared_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
#endif

namespace simt {

namespace {
// NaN in every floating type, and an index that leads out of every array.
constexpr int poison = 0xff;
constexpr size_t widest_access = 16;
}  // namespace

SharedSpace::SharedSpace() {
  void* memory = mmap(nullptr, reserved_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  reserved_ = static_cast<std::byte*>(memory);
}

SharedSpace::~SharedSpace() { munmap(reserved_, reserved_bytes); }

std::byte* SharedSpace::open_slot(size_t slot) {
  std::byte* memory = reserved_ + margin_bytes + slot * slot_bytes;
  if (mprotect(memory, slot_bytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  return memory;
}

void SharedMemory::begin_block(size_t dynamic_bytes, size_t limit) {
  ASAN_POISON_MEMORY_REGION(usable_, SharedSpace::slot_bytes);
  variables_.clear();
  used_ = gap_bytes;
  static_bytes_ = 0;
  dynamic_bytes_ = dynamic_bytes;
  limit_ = limit;
  place(nullptr, "dynamic shared memory", dynamic_bytes, 0, widest_access);
}

void* SharedMemory::dynamic() { return usable_ + variables_.front().begin; }

void* SharedMemory::variable(const void* identity, const char* name, size_t bytes, size_t element_bytes,
                             size_t alignment) {
  for (const Variable& known : variables_)
    if (known.identity == identity) return usable_ + known.begin;
  static_bytes_ += bytes;
  if (static_bytes_ > static_limit || static_bytes_ + dynamic_bytes_ > limit_) return nullptr;
  return place(identity, name, bytes, element_bytes, alignment);
}

void* SharedMemory::place(const void* identity, const char* name, size_t bytes, size_t element_bytes,
                          size_t alignment) {
  // Aligned as its type asks for and no better: wide accesses that count on more are to fail.
  const size_t begin = used_ + (alignment < widest_access ? alignment : 0);
  variables_.push_back({identity, name, begin, bytes, element_bytes});
  used_ = (begin + bytes + 2 * gap_bytes - 1) / gap_bytes * gap_bytes;
  ASAN_UNPOISON_MEMORY_REGION(usable_ + begin, bytes);
  std::memset(usable_ + begin, poison, bytes);
  return usable_ + begin;
}

const SharedMemory::Variable* SharedMemory::find(size_t begin, size_t bytes) const {
  for (const Variable& variable : variables_)
    if (begin >= variable.begin && begin + bytes <= variable.begin + variable.bytes) return &variable;
  return nullptr;
}

std::string SharedMemory::describe(Kind kind, size_t begin, size_t bytes) const {
  // Of all variables the one whose bounds are nearest: with negative indices that is the one behind.
  const auto distance = [&](const Variable& variable) {
    const size_t end = variable.begin + variable.bytes;
    return begin < variable.begin ? variable.begin - begin : begin + bytes > end ? begin + bytes - end : 0;
  };
  const Variable& variable = *std::ranges::min_element(variables_, {}, distance);
  const auto offset = static_cast<std::ptrdiff_t>(begin - variable.begin);
  const auto element = static_cast<std::ptrdiff_t>(variable.element_bytes != 0 ? variable.element_bytes : bytes);
  const auto index = (offset - (offset < 0 ? element - 1 : 0)) / element;
  const char* verb = kind == Kind::read     ? "reads"
                     : kind == Kind::atomic ? "updates"
                     : kind == Kind::copy   ? "copies to"
                                            : "writes";
  return std::string(verb) + " element " + std::to_string(index) + " of " + variable.name + " (byte " +
         std::to_string(offset) + " of " + std::to_string(variable.bytes) + ")";
}

void SharedMemory::remember_read(Byte& byte, const Access& access, const Ordering& ordering) {
  for (Access& slot : byte.reads) {
    if (ordering.precedes(slot, access.thread)) {
      slot = access;
      return;
    }
  }
  const auto warp = [](const Access& reader) { return reader.thread / warp_lanes; };
  if (warp(byte.reads[0]) == warp(byte.reads[1])) byte.reads[1] = access;
}

std::optional<SharedMemory::Finding> SharedMemory::access(Kind kind, const void* address, size_t bytes, unsigned thread,
                                                          const Ordering& ordering) {
  const size_t begin = static_cast<size_t>(static_cast<const std::byte*>(address) - usable_);
  if (find(begin, bytes) == nullptr) return Finding{Fault::bounds, describe(kind, begin, bytes)};

  if (history_.size() < begin + bytes) history_.resize(used_);
  Access access = ordering.now(thread, kind == Kind::atomic);
  access.pending = kind == Kind::copy;
  for (size_t i = begin; i < begin + bytes; ++i) {
    Byte& byte = history_[i];
    const bool initialized = ordering.in_this_block(byte.write);
    if (!initialized) {
      if (kind == Kind::read || kind == Kind::atomic)
        return Finding{Fault::uninitialized, describe(kind, begin, bytes)};
    } else if (byte.write.pending && kind != Kind::arrival) {
      return Finding{Fault::pending, describe(kind, begin, bytes), byte.write.thread};
    } else if (!(access.atomic && byte.write.atomic) && !ordering.precedes(byte.write, thread)) {
      return Finding{Fault::race, describe(kind, begin, bytes) + ", written", byte.write.thread};
    }
    if (kind == Kind::read) {
      remember_read(byte, access, ordering);
      continue;
    }
    for (const Access& read : byte.reads)
      if (!ordering.precedes(read, thread))
        return Finding{Fault::race, describe(kind, begin, bytes) + ", read", read.thread};
    byte.write = access;
  }
  return std::nullopt;
}

}  // namespace simt
