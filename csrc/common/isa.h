// One kernel source, compiled once per instruction set and chosen at run time, so that a wheel needs no -march.
//
// Each compilation (cpu_avx2.cpp, ...) includes its standard headers first, defines FEWSHOT_EXT_ISA and
// FEWSHOT_EXT_VECTOR_BYTES, opens FEWSHOT_EXT_TARGET_BEGIN, includes the kernel and closes it. The kernel lives in a
// namespace named after the instruction set: without it, the linker would keep one version of each inline function and
// run it on processors that lack the instructions.
#pragma once

#include <cstdlib>
#include <cstring>

#define FEWSHOT_EXT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FEWSHOT_EXT_TARGET_BEGIN(isa) \
  FEWSHOT_EXT_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FEWSHOT_EXT_TARGET_END FEWSHOT_EXT_PRAGMA(clang attribute pop)
#else
#define FEWSHOT_EXT_TARGET_BEGIN(isa) FEWSHOT_EXT_PRAGMA(GCC push_options) FEWSHOT_EXT_PRAGMA(GCC target(isa))
#define FEWSHOT_EXT_TARGET_END FEWSHOT_EXT_PRAGMA(GCC pop_options)
#endif

// What cpu_capability() asks of the processor, as the compiler wants it.
#define FEWSHOT_EXT_AVX2 "avx2,fma"
#define FEWSHOT_EXT_AVX512 "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"

#define FEWSHOT_EXT_INLINE inline __attribute__((always_inline))

namespace fewshot_ext {

enum class CpuCapability : int { baseline, avx2, avx512 };

// What the processor offers, lowered by FEWSHOT_EXT_CPU_CAPABILITY=baseline|avx2|avx512. Read at every call, so that
// one test process can hold all versions to the same contract.
inline CpuCapability cpu_capability() {
  CpuCapability found = CpuCapability::baseline;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found = CpuCapability::avx2;
  if (found == CpuCapability::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    found = CpuCapability::avx512;
#endif
  if (const char* wish = std::getenv("FEWSHOT_EXT_CPU_CAPABILITY")) {
    if (std::strcmp(wish, "baseline") == 0) return CpuCapability::baseline;
    if (std::strcmp(wish, "avx2") == 0 && found > CpuCapability::avx2) return CpuCapability::avx2;
  }
  return found;
}

}  // namespace fewshot_ext
