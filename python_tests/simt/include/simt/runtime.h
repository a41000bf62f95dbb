// The calls behind CUDA's vocabulary, compiled apart from the kernels because those are instrumented.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <source_location>
#include <type_traits>

#include "simt/types.h"

namespace simt {

constexpr unsigned warp_lanes = 32;

// As the default of a last parameter this is the line of the kernel that calls an intrinsic.
using Location = std::source_location;

// Of each thread in turn: fibers set them when they continue.
extern uint3 thread_index, block_index;
extern dim3 block_shape, grid_shape;

unsigned lane();

// Waits for all threads of the block; returns for how many of them the predicate holds.
int block_barrier(const char* intrinsic, bool predicate, Location where);

// Waits for all threads of the grid.
void grid_barrier(Location where = Location::current());

// Waits for the lanes of the mask, and orders their accesses to shared memory.
void warp_barrier(uint32_t mask, Location where);

// Waits for the lanes of the mask and returns what each gave. Shuffles and votes put no accesses in order.
using Lanes = std::array<uint64_t, warp_lanes>;
const Lanes& exchange(const char* intrinsic, uint32_t mask, uint64_t value, Location where);

// For a shuffle: the lane must be one that takes part.
uint64_t received_from(unsigned source, const Lanes& values, uint32_t mask, const char* intrinsic, Location where);

// Lets other threads go first. Atomics that change nothing for long are taken for threads that spin.
void before_atomic(const void* address, size_t bytes);
void atomic_changed_memory();
[[noreturn]] void trap(Location where);

void* static_shared(const void* identity, const char* name, size_t bytes, size_t element_bytes, size_t alignment);
void* dynamic_shared();

template <class T>
T& static_shared(const void* identity, const char* name) {
  return *static_cast<T*>(static_shared(identity, name, sizeof(T), sizeof(std::remove_all_extents_t<T>), alignof(T)));
}

enum class LaunchKind { plain, cooperative };

// From now on matrix instructions add in one way, which this seed draws instead of that of a launch, as those of one
// GPU do: the bits of several schedules can then be compared.
void fix_sums(std::optional<uint64_t> seed);

void launch(LaunchKind kind, const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, uint64_t seed,
            const std::function<void()>& thread);

}  // namespace simt
