// Kernels are compiled with -fsanitize=thread,bounds,alignment and linked without the runtimes of these: g++ calls the
// functions below before each access to memory and for each index outside its array. So kernels use shared
// memory through plain pointers, as CUDA does.

#include <cstdio>
#include <cstdlib>
#include <string>

#include "runtime/block.h"

namespace {

inline void record(simt::SharedMemory::Kind kind, const void* address, size_t bytes) {
  simt::Block* block = simt::Block::running();
  if (block != nullptr && block->shared().is_shared(address)) block->check(kind, address, bytes);
}

}  // namespace

void simt::before_atomic(const void* address, size_t bytes) {
  Block::running()->yield();
  follow(SharedMemory::Kind::atomic, address, bytes);
}

void simt::follow(SharedMemory::Kind kind, const void* address, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  static_cast<void>(kind), static_cast<void>(address), static_cast<void>(bytes);
#else
  record(kind, address, bytes);
#endif
}

#define SIMT_ACCESS(bytes)                                                                                      \
  extern "C" void __tsan_read##bytes(void* address) { record(simt::SharedMemory::Kind::read, address, bytes); } \
  extern "C" void __tsan_write##bytes(void* address) { record(simt::SharedMemory::Kind::write, address, bytes); }

SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)

extern "C" void __tsan_read_range(void* address, size_t bytes) {
  record(simt::SharedMemory::Kind::read, address, bytes);
}
extern "C" void __tsan_write_range(void* address, size_t bytes) {
  record(simt::SharedMemory::Kind::write, address, bytes);
}

extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" void __tsan_vptr_read(void*) {}

// What assert calls. The one of the C library would end the process.
extern "C" [[noreturn]] void __assert_fail(const char* condition, const char* file, unsigned line,
                                           const char*) noexcept {
  const std::string what = std::string("assert(") + condition + ") at " + simt::file_and_line(file, line);
  if (simt::Block* block = simt::Block::running()) block->fail<simt::Trap>(what);
  std::fprintf(stderr, "%s\n", what.c_str());
  std::abort();
}

// std::atomic and reference counts of the host code in the same file.
#define SIMT_ATOMIC(bits)                                                                                           \
  extern "C" uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* address, int) {               \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                                 \
  extern "C" void __tsan_atomic##bits##_store(volatile uint##bits##_t* address, uint##bits##_t value, int) {        \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                                             \
  }                                                                                                                 \
  extern "C" uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* address, uint##bits##_t value,  \
                                                           int) {                                                   \
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                                 \
  extern "C" uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* address, uint##bits##_t value, \
                                                            int) {                                                  \
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                                 \
  extern "C" uint##bits##_t __tsan_atomic##bits##_fetch_sub(volatile uint##bits##_t* address, uint##bits##_t value, \
                                                            int) {                                                  \
    return __atomic_fetch_sub(address, value, __ATOMIC_SEQ_CST);                                                    \
  }

SIMT_ATOMIC(8)
SIMT_ATOMIC(32)
SIMT_ATOMIC(64)

#if !defined(__SANITIZE_ADDRESS__)

namespace {

// What g++ hands over, in the layout of its UndefinedBehaviorSanitizer.
struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};
struct Where {
  const char* file;
  uint32_t line, column;
};
struct OutOfBoundsData {
  Where where;
  const TypeDescriptor* array;
  const TypeDescriptor* index;
};
struct TypeMismatchData {
  Where where;
  const TypeDescriptor* type;
  unsigned char log_alignment, kind;
};

}  // namespace

// An index that leaves the row of a tile and stays in the tile: the type tells, the address does not.
extern "C" void __ubsan_handle_out_of_bounds_abort(const OutOfBoundsData* data, intptr_t index) {
  simt::Block* block = simt::Block::running();
  if (block == nullptr) std::abort();
  block->fail<simt::OutOfBounds>("index " + std::to_string(index) + " of " + data->array->name + " at " +
                                 simt::file_and_line(data->where.file, data->where.line) + ", out of bounds");
}

// Of float4 and its kin, which the CPU would load from anywhere.
extern "C" void __ubsan_handle_type_mismatch_v1_abort(const TypeMismatchData* data, uintptr_t address) {
  simt::Block* block = simt::Block::running();
  if (block == nullptr) std::abort();
  block->fail<simt::Misaligned>(
      "access to " + std::string(data->type->name) + " at " + simt::file_and_line(data->where.file, data->where.line) +
      ", " + std::to_string(address % (uintptr_t{1} << data->log_alignment)) + " bytes off its alignment");
}

#endif
