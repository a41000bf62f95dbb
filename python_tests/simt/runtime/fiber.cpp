#include "runtime/fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

Fiber Fiber::of_this_thread() {
  pthread_attr_t attributes;
  void* stack = nullptr;
  size_t bytes = 0;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &stack, &bytes);
    pthread_attr_destroy(&attributes);
  }
  return Fiber(static_cast<std::byte*>(stack), bytes);
}

// swapcontext enters the kernel to save the signal mask, which costs more than all else a switch does. So
// x86-64, where most runs are, saves the registers that a function call has to preserve and nothing else.
#if defined(SIMT_USES_UCONTEXT)

void Fiber::swap(Fiber& from, Fiber& to) { swapcontext(from.context_.get(), to.context_.get()); }

#else

extern "C" void simt_swap_stacks(void** from, void* to);
asm(R"(
  .pushsection .text
  .type simt_swap_stacks, @function
simt_swap_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_swap_stacks, .-simt_swap_stacks
  .popsection
)");

void Fiber::swap(Fiber& from, Fiber& to) { simt_swap_stacks(&from.stack_pointer_, to.stack_pointer_); }

#endif

void Fiber::prepare(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
  // The last block left the marks of its frames.
  ASAN_UNPOISON_MEMORY_REGION(stack_, stack_bytes_);
#endif
  asan_stack_ = nullptr;
#if defined(SIMT_USES_UCONTEXT)
  getcontext(context_.get());
  context_->uc_stack.ss_sp = stack_;
  context_->uc_stack.ss_size = stack_bytes_;
  context_->uc_link = nullptr;
  makecontext(context_.get(), entry, 0);
#else
  // As if `entry` had been called from address 0 and swapped out in its first instruction: six registers, the
  // address to return to, and a caller, which leaves the stack aligned as a call does.
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes_);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  stack_pointer_ = top;
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.asan_stack_, to.stack_, to.stack_bytes_);
#endif
  swap(from, to);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.asan_stack_, nullptr, nullptr);
#endif
}

void Fiber::leave(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, to.stack_, to.stack_bytes_);
#endif
  swap(from, to);
  std::abort();
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

namespace {
constexpr size_t guard_bytes = 64 << 10;  // a page, whatever the machine's size of one
constexpr size_t pitch = Stacks::bytes + guard_bytes;
}  // namespace

Stacks::Stacks(size_t count) : count_(count) {
  void* memory =
      mmap(nullptr, count * pitch, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<std::byte*>(memory);
  for (size_t i = 0; i < count; ++i) {
    if (mprotect(memory_ + i * pitch, guard_bytes, PROT_NONE) == 0) continue;
    munmap(memory_, count * pitch);
    throw std::bad_alloc();
  }
}

Stacks::~Stacks() { munmap(memory_, count_ * pitch); }

Fiber Stacks::fiber(size_t index) const {
  // Stacks a power of two apart would meet in the same few lines of the cache.
  const size_t shift = index % 64 * 512;
  return Fiber(memory_ + index * pitch + guard_bytes, bytes - shift);
}

void Fibers::reserve(size_t count) {
  while (fibers_.size() < count) {
    const Stacks& stacks = stacks_.emplace_back(at_once);
    for (size_t i = 0; i < at_once; ++i) fibers_.push_back(stacks.fiber(i));
  }
}

}  // namespace simt
