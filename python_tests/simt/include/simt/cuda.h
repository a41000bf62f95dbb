// CUDA C++ as a kernel sees it, for g++.
#pragma once

// Before the macros below, whose names a standard header may use in its own way.
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simt/atomics.h"
#include "simt/launch.h"
#include "simt/math.h"
#include "simt/matrix.h"
#include "simt/runtime.h"
#include "simt/types.h"
#include "simt/warp.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#define threadIdx ::simt::thread_index
#define blockIdx ::simt::block_index
#define blockDim ::simt::block_shape
#define gridDim ::simt::grid_shape

constexpr int warpSize = simt::warp_lanes;

inline void __syncthreads(simt::Location where = simt::Location::current()) {
  simt::block_barrier("__syncthreads", false, where);
}

inline int __syncthreads_count(int predicate, simt::Location where = simt::Location::current()) {
  return simt::block_barrier("__syncthreads_count", predicate != 0, where);
}

inline int __syncthreads_or(int predicate, simt::Location where = simt::Location::current()) {
  return simt::block_barrier("__syncthreads_or", predicate != 0, where) != 0;
}

inline int __syncthreads_and(int predicate, simt::Location where = simt::Location::current()) {
  return simt::block_barrier("__syncthreads_and", predicate == 0, where) == 0;
}

// Fibers see each other's writes at once, so fences have nothing to do.
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __threadfence_system() {}

inline void __trap(simt::Location where = simt::Location::current()) { simt::trap(where); }

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldca(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stwb(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
