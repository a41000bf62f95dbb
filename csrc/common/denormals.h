// Arithmetic by IEEE 754 for kernels that rely on it, whatever mode the calling program has chosen.
#pragma once

#include <cstdint>

namespace fewshot_ext {

// While it lives, its thread computes with denormal numbers; torch.set_flush_denormal(True), or a library that was
// linked for speed, takes them for zero.
class DenormalNumbers {
 public:
  DenormalNumbers() : before_(read()) { write(before_ & ~flushing); }
  ~DenormalNumbers() { write(before_); }
  DenormalNumbers(const DenormalNumbers&) = delete;
  DenormalNumbers& operator=(const DenormalNumbers&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint32_t flushing = 0x8040;  // results, and operands
  static uint32_t read() {
    uint32_t state;
    asm volatile("stmxcsr %0" : "=m"(state));
    return state;
  }
  static void write(uint32_t state) { asm volatile("ldmxcsr %0" : : "m"(state) : "memory"); }
  const uint32_t before_;
#elif defined(__aarch64__)
  static constexpr uint64_t flushing = uint64_t(1) << 24;
  static uint64_t read() {
    uint64_t state;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
  }
  static void write(uint64_t state) { asm volatile("msr fpcr, %0" : : "r"(state) : "memory"); }
  const uint64_t before_;
#else
  static constexpr uint32_t flushing = 0;
  static uint32_t read() { return 0; }
  static void write(uint32_t) {}
  const uint32_t before_;
#endif
};

}  // namespace fewshot_ext
