// What a kernel source includes instead of the CUDA runtime, so that g++ can read it too.
//
// Under nvcc this is CUDA itself. With FEWSHOT_EXT_SIMT defined cuda_runtime.h is that of an emulator, which runs the
// kernel on the CPU and checks its use of shared memory, barriers and warp intrinsics. A kernel then differs from plain
// CUDA in two places, because no C++ compiler knows storage that belongs to a block:
//
//   FEWSHOT_EXT_SHARED(float, tile, [32][33]);     __shared__ float tile[32][33];
//   float* row = dynamic_shared<float>();          extern __shared__ float row[];
//
// A type with a comma in it needs a name of its own to pass through the macro.
//
// Matrix instructions and asynchronous copies are in mma.cuh.
#pragma once

#include <cuda_runtime.h>

#if defined(FEWSHOT_EXT_SIMT)

#define FEWSHOT_EXT_SHARED(type, name, ...)    \
  static const char simt_identity_of_##name{}; \
  auto& name = ::simt::static_shared<type __VA_ARGS__>(&simt_identity_of_##name, #name)

#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "fewshot_ext: expected a CUDA architecture of 8.0 or later"
#endif

#define FEWSHOT_EXT_SHARED(type, name, ...) __shared__ type name __VA_ARGS__

#endif

namespace fewshot_ext {

// The line that calls a function, as the default of its last parameter: the emulator tells by it which lanes execute
// the same instruction, and names it in errors. On a GPU it is nothing.
#if defined(FEWSHOT_EXT_SIMT)
using Caller = ::simt::Location;
#else
struct Caller {
  __device__ static constexpr Caller current() { return {}; }
};
#endif

// The shared memory asked for at launch, aligned for vector loads. A function, because nvcc refuses two
// instances of a template that declare `extern __shared__` arrays of one name and two types.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(FEWSHOT_EXT_SIMT)
  return static_cast<T*>(::simt::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char fewshot_ext_dynamic_shared[];
  return reinterpret_cast<T*>(fewshot_ext_dynamic_shared);
#endif
}

}  // namespace fewshot_ext
