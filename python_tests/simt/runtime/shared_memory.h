// The shared memory of a block, and who touched each byte of it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "runtime/ordering.h"

namespace simt {

// Room for the shared memory of many blocks side by side, so that one comparison tells any of it from global memory.
class SharedSpace {
 public:
  // Far more address space than memory, so that a wild index still lands in it and not in somebody's data.
  static constexpr size_t margin_bytes = size_t{512} << 20;
  static constexpr size_t slot_bytes = size_t{1} << 20;
  static constexpr size_t slots = 132 * 32;
  static constexpr size_t reserved_bytes = 2 * margin_bytes + slots * slot_bytes;

  SharedSpace(const SharedSpace&) = delete;
  SharedSpace();
  ~SharedSpace();
  std::byte* begin() const { return reserved_; }
  std::byte* open_slot(size_t slot);

 private:
  std::byte* reserved_;
};

class SharedMemory {
 public:
  static constexpr size_t static_limit = 48 << 10;
  static constexpr size_t total_limit = 227 << 10;

  // An asynchronous copy writes twice: where it is issued what was before has to be over, and where its thread has
  // waited it arrives, for others to read after a barrier.
  enum class Kind { read, write, atomic, copy, arrival };
  enum class Fault { bounds, uninitialized, race, pending };
  struct Finding {
    Fault fault;
    std::string what;                           // as the thread at fault does it
    std::optional<unsigned> other_thread = {};  // of a race, or whose copy is pending
  };

  SharedMemory(const SharedMemory&) = delete;
  SharedMemory(SharedSpace& space, size_t slot) : space_(space.begin()), usable_(space.open_slot(slot)) {}

  void begin_block(size_t dynamic_bytes, size_t limit);
  size_t limit() const { return limit_; }  // in all
  void* dynamic();
  // The same storage for each thread of the block; null where that exceeds the limit.
  void* variable(const void* identity, const char* name, size_t bytes, size_t element_bytes, size_t alignment);

  // Also what belongs to other blocks.
  bool is_shared(const void* address) const {
    return static_cast<size_t>(static_cast<const std::byte*>(address) - space_) < SharedSpace::reserved_bytes;
  }
  std::optional<Finding> access(Kind kind, const void* address, size_t bytes, unsigned thread,
                                const Ordering& ordering);

 private:
  static constexpr size_t gap_bytes = 1 << 10;  // between two variables

  struct Variable {
    const void* identity;
    std::string name;
    size_t begin, bytes, element_bytes;
  };

  // Of the readers since the last write two suffice: if any two threads, or any two warps, read, it keeps two
  // such, and a later writer differs from one of them.
  struct Byte {
    Access write;
    std::array<Access, 2> reads;
  };

  void* place(const void* identity, const char* name, size_t bytes, size_t element_bytes, size_t alignment);
  const Variable* find(size_t begin, size_t bytes) const;
  std::string describe(Kind kind, size_t begin, size_t bytes) const;
  static void remember_read(Byte& byte, const Access& access, const Ordering& ordering);

  std::byte* space_;
  std::byte* usable_;
  std::vector<Byte> history_;  // as far as anyone has come
  std::vector<Variable> variables_;
  size_t used_ = 0;
  size_t static_bytes_ = 0;
  size_t dynamic_bytes_ = 0;
  size_t limit_ = total_limit;
};

}  // namespace simt
