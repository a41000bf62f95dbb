// A stack of its own and the place where it continues: what makes a CUDA thread out of a function call.
#pragma once

#include <cstddef>
#include <deque>
#include <memory>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#define SIMT_USES_UCONTEXT
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  // The caller's own stack, to which fibers return.
  static Fiber of_this_thread();

  // Runs `entry` when first switched to; `entry` ends by leaving for another fiber.
  Fiber(std::byte* stack, size_t stack_bytes) : stack_(stack), stack_bytes_(stack_bytes) {}
  void prepare(void (*entry)());

  static void switch_to(Fiber& from, Fiber& to);
  [[noreturn]] static void leave(Fiber& from, Fiber& to);

  // First thing to call in `entry`.
  static void arrived();

 private:
  static void swap(Fiber& from, Fiber& to);

  std::byte* stack_;
  size_t stack_bytes_;
  void* asan_stack_ = nullptr;  // AddressSanitizer's copy of the locals, while the fiber is suspended
#if defined(SIMT_USES_UCONTEXT)
  std::unique_ptr<ucontext_t> context_ = std::make_unique<ucontext_t>();
#else
  void* stack_pointer_ = nullptr;
#endif
};

// Stacks side by side, each above a page that faults, so that an overflow does not spoil its neighbor.
class Stacks {
 public:
  static constexpr size_t bytes = size_t{256} << 10;

  Stacks(const Stacks&) = delete;
  explicit Stacks(size_t count);
  ~Stacks();
  Fiber fiber(size_t index) const;

 private:
  std::byte* memory_;
  size_t count_;
};

// As many as any launch has needed so far, because stacks are dear to make.
class Fibers {
 public:
  void reserve(size_t count);
  Fiber& operator[](size_t index) { return fibers_[index]; }

 private:
  static constexpr size_t at_once = 256;

  std::deque<Stacks> stacks_;
  std::deque<Fiber> fibers_;
};

}  // namespace simt
