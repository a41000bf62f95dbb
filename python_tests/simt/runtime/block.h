// One block at a time: its threads, whose turn it is, and what they wait for.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "runtime/fiber.h"
#include "runtime/ordering.h"
#include "runtime/random.h"
#include "runtime/shared_memory.h"
#include "simt/errors.h"
#include "simt/runtime.h"

namespace simt {

struct Thread {
  enum class State { ready, at_barrier, in_exchange, exited };

  Fiber fiber;
  uint3 index;
  unsigned rank;  // within the block
  State state = State::ready;

  // While it waits, and of an exchange also what it came with and got.
  const char* intrinsic = nullptr;
  Location where = {};
  uint32_t mask = 0;
  uint64_t given = 0;
  Lanes received = {};

  unsigned warp() const { return rank / warp_lanes; }
  unsigned lane() const { return rank % warp_lanes; }
};

struct Launch {
  const char* kernel;
  dim3 grid, block;
  size_t dynamic_shared_bytes;
  const std::function<void()>& thread;
};

std::string file_and_line(const char* file, unsigned line);  // without the folders

class Block {
 public:
  // One serves all launches, because stacks are dear to make. Launches come one at a time.
  static Block& instance();

  // Null between launches, when host code of an instrumented file runs.
  bool running() const { return current_ != nullptr; }
  void run(const Launch& launch, uint3 index, bool skewed, Random& random);

  const Thread& current() const { return *current_; }
  int barrier(const char* intrinsic, bool predicate, Location where);
  const Lanes& exchange(const char* intrinsic, uint32_t mask, uint64_t value, Location where, bool orders_memory);
  void yield();
  void note_progress() { idle_turns_ = 0; }

  SharedMemory& shared() { return shared_; }
  void check(SharedMemory::Kind kind, const void* address, size_t bytes);

  // Errors are found where no exception may pass. So the thread stops here for good, and the launch throws.
  template <class Error>
  [[noreturn]] void fail(const std::string& what) {
    stop(std::make_exception_ptr(Error(prefix() + what)));
  }

 private:
  static void run_thread();
  void start_threads();
  void enter(Thread& thread);
  Thread& next();
  void suspend();
  void make_ready(Thread& thread);
  void resolve_stall();
  void release_barrier();
  void complete_if_last(const Thread& last, bool orders_memory);
  [[noreturn]] void stop(std::exception_ptr error);
  [[noreturn]] void report_missing_lane(Thread& waiting);
  [[noreturn]] void report_divergence(Thread& waiting, const Thread& other);

  Thread* at(unsigned warp, unsigned lane);
  std::string prefix() const;
  std::string name(const Thread& thread) const;
  std::string activity(const Thread& thread) const;

  const Launch* launch_ = nullptr;
  Random* random_ = nullptr;
  Fiber launcher_ = Fiber::of_this_thread();
  std::unique_ptr<Stacks> stacks_;
  std::vector<Thread> threads_;
  Thread* current_ = nullptr;
  unsigned alive_ = 0;
  std::exception_ptr error_;

  // Bit by bit the lanes that can go on, for each warp, and the warps that have such lanes.
  std::array<uint32_t, warp_lanes> ready_lanes_ = {};
  uint32_t ready_warps_ = 0;
  std::vector<unsigned> rank_of_warps_;  // who goes first; empty where all advance alike
  uint64_t idle_turns_ = 0;

  int arrived_with_predicate_ = 0;
  int barrier_count_ = 0;

  Ordering ordering_;
  SharedMemory shared_;
};

}  // namespace simt
