// What the emulator finds wrong. Every message names the kernel, the block and the thread.
#pragma once

#include <stdexcept>

namespace simt {

struct KernelError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The grid, the block or the shared memory is more than a device offers.
struct LaunchError : KernelError {
  using KernelError::KernelError;
};

// Some threads of the block wait at a barrier that others do not reach.
struct DivergentBarrier : KernelError {
  using KernelError::KernelError;
};

// A warp intrinsic names a lane that does not execute it, or not with the same mask.
struct MissingLane : KernelError {
  using KernelError::KernelError;
};

// Two threads access the same shared memory, one of them writes, and no barrier lies between.
struct MissingBarrier : KernelError {
  using KernelError::KernelError;
};

// Shared memory is touched that an asynchronous copy is to write, or a thread exits before it has waited for its
// copies.
struct PendingCopy : KernelError {
  using KernelError::KernelError;
};

// Of shared memory, or of an array whose length the compiler knows.
struct OutOfBounds : KernelError {
  using KernelError::KernelError;
};

// An access at an address that its type, such as float4, does not allow.
struct Misaligned : KernelError {
  using KernelError::KernelError;
};

// Shared memory is read that no thread of this block has written.
struct UninitializedShared : KernelError {
  using KernelError::KernelError;
};

// Threads spin on something that never comes.
struct Deadlock : KernelError {
  using KernelError::KernelError;
};

struct Trap : KernelError {
  using KernelError::KernelError;
};

}  // namespace simt
