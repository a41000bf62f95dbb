// Warp intrinsics. Stricter than hardware in one point: a lane in the mask that has exited, or that the block
// does not have, is an error, although some devices let it pass.
#pragma once

#include <bit>
#include <cstring>
#include <type_traits>

#include "simt/runtime.h"

namespace simt {

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_arithmetic_v<T> || (std::is_trivially_copyable_v<T> && sizeof(T) == 2),
                "warp intrinsics take numbers");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
T shuffle(const char* intrinsic, uint32_t mask, T value, unsigned source, Location where) {
  const Lanes& values = exchange(intrinsic, mask, to_bits(value), where);
  return from_bits<T>(received_from(source, values, mask, intrinsic, where));
}

// First lane of the group of `width` lanes that this lane belongs to.
inline unsigned first_of_group(int width) { return lane() & ~static_cast<unsigned>(width - 1); }

template <class T, class Combine>
T reduce(const char* intrinsic, uint32_t mask, T value, Location where, Combine combine) {
  const Lanes& values = exchange(intrinsic, mask, to_bits(value), where);
  T result = from_bits<T>(values[std::countr_zero(mask)]);
  for (uint32_t rest = mask & (mask - 1); rest != 0; rest &= rest - 1)
    result = combine(result, from_bits<T>(values[std::countr_zero(rest)]));
  return result;
}

inline uint32_t ballot(const char* intrinsic, uint32_t mask, bool predicate, Location where) {
  const Lanes& values = exchange(intrinsic, mask, predicate, where);
  uint32_t votes = 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int member = std::countr_zero(rest);
    votes |= static_cast<uint32_t>(values[member]) << member;
  }
  return votes;
}

}  // namespace simt

inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Location where = simt::Location::current()) {
  simt::warp_barrier(mask, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Location where = simt::Location::current()) {
  const unsigned lane = simt::first_of_group(width) + (static_cast<unsigned>(source) & (width - 1));
  return simt::shuffle("__shfl_sync", mask, value, lane, where);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 simt::Location where = simt::Location::current()) {
  const bool inside = simt::lane() >= simt::first_of_group(width) + delta;
  return simt::shuffle("__shfl_up_sync", mask, value, inside ? simt::lane() - delta : simt::lane(), where);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   simt::Location where = simt::Location::current()) {
  const bool inside = simt::lane() + delta < simt::first_of_group(width) + width;
  return simt::shuffle("__shfl_down_sync", mask, value, inside ? simt::lane() + delta : simt::lane(), where);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  simt::Location where = simt::Location::current()) {
  // Earlier groups may be read, later ones may not.
  const unsigned source = simt::lane() ^ static_cast<unsigned>(lane_mask);
  const bool inside = source < simt::first_of_group(width) + width;
  return simt::shuffle("__shfl_xor_sync", mask, value, inside ? source : simt::lane(), where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Location where = simt::Location::current()) {
  return simt::ballot("__ballot_sync", mask, predicate != 0, where);
}

inline int __any_sync(unsigned mask, int predicate, simt::Location where = simt::Location::current()) {
  return simt::ballot("__any_sync", mask, predicate != 0, where) != 0;
}

inline int __all_sync(unsigned mask, int predicate, simt::Location where = simt::Location::current()) {
  return simt::ballot("__all_sync", mask, predicate != 0, where) == mask;
}

// Lanes of a warp need not run together, and whoever relies on more than the calling lane is to find out.
inline unsigned __activemask() { return 1u << simt::lane(); }

template <class T>
unsigned __match_any_sync(unsigned mask, T value, simt::Location where = simt::Location::current()) {
  const uint64_t mine = simt::to_bits(value);
  const simt::Lanes& values = simt::exchange("__match_any_sync", mask, mine, where);
  unsigned equal = 0;
  for (unsigned member = 0; member < simt::warp_lanes; ++member)
    if ((mask >> member & 1u) != 0 && values[member] == mine) equal |= 1u << member;
  return equal;
}

#define SIMT_REDUCE(name, type, expression)                                                              \
  inline type name(unsigned mask, type value, simt::Location where = simt::Location::current()) {        \
    return simt::reduce(#name, mask, value, where, [](type a, type b) -> type { return (expression); }); \
  }

SIMT_REDUCE(__reduce_add_sync, unsigned, a + b)
SIMT_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
SIMT_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
SIMT_REDUCE(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
SIMT_REDUCE(__reduce_min_sync, int, a < b ? a : b)
SIMT_REDUCE(__reduce_max_sync, int, a > b ? a : b)
SIMT_REDUCE(__reduce_and_sync, unsigned, a& b)
SIMT_REDUCE(__reduce_or_sync, unsigned, a | b)
SIMT_REDUCE(__reduce_xor_sync, unsigned, a ^ b)

#undef SIMT_REDUCE
