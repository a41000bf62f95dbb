// Atomics, for the types that CUDA has them for. Threads take turns at each, so their order varies by seed.
#pragma once

#include <type_traits>

#include "simt/runtime.h"

namespace simt {

template <class T, class... Allowed>
concept one_of = (std::is_same_v<T, Allowed> || ...);

// Its accesses are known to be atomic and must not be recorded once more as plain ones.
template <class T, class Update>
__attribute__((no_sanitize("thread"))) T atomic_update(T* address, Update update) {
  before_atomic(address, sizeof(T));
  const T old = *address;
  const T updated = update(old);
  if (updated != old) atomic_changed_memory();
  *address = updated;
  return old;
}

}  // namespace simt

template <simt::one_of<int, unsigned, unsigned long long, float, double> T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [=](T old) -> T {
    if constexpr (std::is_same_v<T, int>)
      return static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));
    else
      return old + value;
  });
}

template <simt::one_of<int, unsigned> T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return simt::atomic_update(
      address, [=](T old) { return static_cast<T>(static_cast<unsigned>(old) - static_cast<unsigned>(value)); });
}

template <simt::one_of<int, unsigned, long long, unsigned long long> T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [=](T old) { return old > value ? old : value; });
}

template <simt::one_of<int, unsigned, long long, unsigned long long> T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [=](T old) { return old < value ? old : value; });
}

template <simt::one_of<int, unsigned, unsigned long long> T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [=](T old) { return old & value; });
}

template <simt::one_of<int, unsigned, unsigned long long> T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [=](T old) { return old | value; });
}

template <simt::one_of<int, unsigned, unsigned long long> T>
T atomicXor(T* address, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [=](T old) { return old ^ value; });
}

template <simt::one_of<unsigned> T>
T atomicInc(T* address, std::type_identity_t<T> last) {
  return simt::atomic_update(address, [=](T old) { return old >= last ? 0 : old + 1; });
}

template <simt::one_of<int, unsigned, unsigned long long, float> T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [=](T) { return value; });
}

template <simt::one_of<int, unsigned, unsigned long long, unsigned short> T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return simt::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}
