// A block: its threads, whose turn it is, and what they wait for.
#pragma once

#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "runtime/async_copies.h"
#include "runtime/fiber.h"
#include "runtime/ordering.h"
#include "runtime/random.h"
#include "runtime/shared_memory.h"
#include "simt/errors.h"
#include "simt/runtime.h"

namespace simt {

struct Thread {
  enum class State { ready, at_barrier, at_grid_barrier, in_exchange, exited };

  Fiber* fiber;
  uint3 index;
  unsigned rank;  // within the block
  State state = State::ready;

  // While it waits, and of an exchange also what it came with and got.
  const char* intrinsic = nullptr;
  Location where = {};
  uint32_t mask = 0;
  uint64_t given = 0;
  Lanes received = {};

  AsyncCopies copies = {};

  unsigned warp() const { return rank / warp_lanes; }
  unsigned lane() const { return rank % warp_lanes; }
};

// What all blocks of a grid share.
struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t dynamic_shared_bytes;
  const std::function<void()>& thread;
  LaunchKind kind;
  bool skewed;       // some warps of a block run ahead
  bool interleaved;  // blocks take turns also before they have to
  bool cuts_off;     // sums of matrix instructions, where otherwise they are rounded to nearest
  Random random;
  std::optional<Random> sums;  // where matrix instructions add alike, whatever the schedule: draws their one order
  size_t shared_limit = SharedMemory::total_limit;  // of a block
  uint64_t idle_turns = 0;

  bool cooperative() const { return kind == LaunchKind::cooperative; }
};

std::string file_and_line(const char* file, unsigned line);  // without the folders
std::string file_and_line(Location where);

// An access that the runtime does for the thread that runs. The build for AddressSanitizer does not see the plain ones
// that it would have to be compared with.
void follow(SharedMemory::Kind kind, const void* address, size_t bytes);

// Done once, when all lanes have come, by the last of them.
using Together = void (*)(const Lanes& given, Launch& launch);

class Block {
 public:
  enum class State { ready, at_grid_barrier, exited };

  // Whose thread runs. Null between launches, when host code of an instrumented file runs.
  static Block* running() { return running_; }

  Block(Fiber& launcher, SharedSpace& space, size_t slot) : launcher_(launcher), shared_(space, slot) {}

  // The fibers are one for each thread, from the first on.
  void start(Launch& launch, uint3 index, Fibers& fibers, size_t first_fiber);
  // Goes on until all its threads have exited or wait for other blocks, or it gives way to these.
  void resume();
  State state() const;
  // Of a block at the grid barrier: throws if the other one, which is not ready either, does not wait in the same.
  void check_grid_barrier(const Block& other) const;
  void release_barrier();

  const Thread& current() const { return *current_; }
  int barrier(const char* intrinsic, bool predicate, Location where);
  void grid_barrier(const char* intrinsic, Location where);
  const Lanes& exchange(const char* intrinsic, uint32_t mask, uint64_t value, Location where, bool orders_memory,
                        Together together = nullptr);
  void yield();
  void note_progress() { launch_->idle_turns = 0; }

  void start_copy(const char* intrinsic, void* to, const void* from, int bytes, Location where);
  void commit_copies() { current_->copies.commit(); }
  void wait_for_copies(uint64_t pending);

  SharedMemory& shared() { return shared_; }
  // Fails unless 16 bytes may be read or written there at once, in the memory that the instruction is for.
  void require_place(const char* intrinsic, const void* address, bool shared, Location where);
  void check(SharedMemory::Kind kind, const void* address, size_t bytes);

  // Errors are found where no exception may pass. So the thread stops here for good, and the launch throws.
  template <class Error>
  [[noreturn]] void fail(const std::string& what) {
    stop(std::make_exception_ptr(Error(prefix(*current_) + what)));
  }

 private:
  static void run_thread();
  void enter(Thread& thread);
  Fiber& next_thread();
  Fiber& next();
  void suspend();
  bool gives_way();
  void make_ready(Thread& thread);
  void resolve_stall();
  void complete_if_last(const Thread& last, bool orders_memory, Together together);
  [[noreturn]] void stop(std::exception_ptr error);
  [[noreturn]] void report_missing_lane(Thread& waiting);
  [[noreturn]] void report_divergence(Thread& waiting, const Thread& other);

  Thread* at(unsigned warp, unsigned lane);
  std::string prefix(const Thread& thread) const;
  std::string name(const Thread& thread) const;
  std::string activity(const Thread& thread) const;

  static inline Block* running_ = nullptr;

  Fiber& launcher_;
  Launch* launch_ = nullptr;
  uint3 index_ = {};
  std::vector<Thread> threads_;
  Thread* current_ = nullptr;
  unsigned alive_ = 0;
  std::exception_ptr error_;

  // Bit by bit the lanes that can go on, for each warp, and the warps that have such lanes.
  std::array<uint32_t, warp_lanes> ready_lanes_ = {};
  uint32_t ready_warps_ = 0;
  std::vector<unsigned> rank_of_warps_;  // who goes first; empty where all advance alike

  int arrived_with_predicate_ = 0;
  int barrier_count_ = 0;

  Ordering ordering_;
  SharedMemory shared_;
};

}  // namespace simt
