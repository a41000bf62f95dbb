#include "runtime/block.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <utility>

namespace simt {

uint3 thread_index, block_index;
dim3 block_shape, grid_shape;

namespace {

constexpr unsigned most_threads = 1024;
// So many turns at atomics that change nothing, without anyone getting past a barrier or to the end.
constexpr uint64_t patience = 10'000'000;

std::string to_text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

std::string to_hex(uint32_t mask) {
  char text[11];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

bool same_call(const Thread& a, const Thread& b) {
  return a.where.line() == b.where.line() && std::strcmp(a.intrinsic, b.intrinsic) == 0 &&
         std::strcmp(a.where.file_name(), b.where.file_name()) == 0;
}

// Random, and biased where the set is sparse, which does no harm to a schedule.
unsigned any_member(uint32_t set, Random& random) {
  const unsigned shift = random() % 32;
  return (std::countr_zero(std::rotr(set, static_cast<int>(shift))) + shift) % 32;
}

}  // namespace

std::string file_and_line(const char* file, unsigned line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash != nullptr ? slash + 1 : file) + ":" + std::to_string(line);
}

Block& Block::instance() {
  static Block block;
  return block;
}

void Block::run(const Launch& launch, uint3 index, bool skewed, Random& random) {
  launch_ = &launch;
  random_ = &random;
  block_index = index;
  error_ = nullptr;
  const unsigned count = launch.block.x * launch.block.y * launch.block.z;
  if (!stacks_) stacks_ = std::make_unique<Stacks>(most_threads);
  while (threads_.size() < count) {
    const auto rank = static_cast<unsigned>(threads_.size());
    threads_.push_back({stacks_->fiber(rank), {}, rank});
  }
  threads_.erase(threads_.begin() + count, threads_.end());

  rank_of_warps_.clear();
  if (skewed) {
    for (unsigned warp = 0; warp * warp_lanes < count; ++warp) rank_of_warps_.push_back(warp);
    random.shuffle(rank_of_warps_);
  }
  start_threads();
  Thread& first = next();
  enter(first);
  Fiber::switch_to(launcher_, first.fiber);
  current_ = nullptr;
  if (error_) std::rethrow_exception(error_);
}

void Block::start_threads() {
  const dim3 shape = launch_->block;
  alive_ = static_cast<unsigned>(threads_.size());
  ready_lanes_ = {};
  ready_warps_ = 0;
  note_progress();
  arrived_with_predicate_ = 0;
  ordering_.begin_block(alive_);
  shared_.begin_block(launch_->dynamic_shared_bytes);
  for (Thread& thread : threads_) {
    thread.index = {thread.rank % shape.x, thread.rank / shape.x % shape.y, thread.rank / shape.x / shape.y};
    thread.fiber.prepare(run_thread);
    make_ready(thread);
  }
}

void Block::run_thread() {
  Fiber::arrived();
  Block& block = instance();
  block.launch_->thread();
  Thread& self = *block.current_;
  self.state = Thread::State::exited;
  block.note_progress();
  if (--block.alive_ == 0) Fiber::leave(self.fiber, block.launcher_);
  Thread& successor = block.next();
  block.enter(successor);
  Fiber::leave(self.fiber, successor.fiber);
}

void Block::stop(std::exception_ptr error) {
  error_ = std::move(error);
  Fiber::leave(current_->fiber, launcher_);
}

void Block::enter(Thread& thread) {
  current_ = &thread;
  thread_index = thread.index;
}

void Block::make_ready(Thread& thread) {
  thread.state = Thread::State::ready;
  ready_lanes_[thread.warp()] |= 1u << thread.lane();
  ready_warps_ |= 1u << thread.warp();
}

Thread& Block::next() {
  if (ready_warps_ == 0) resolve_stall();
  unsigned warp;
  if (rank_of_warps_.empty()) {
    warp = any_member(ready_warps_, *random_);
  } else {
    const auto ready = [this](unsigned candidate) { return (ready_warps_ >> candidate & 1u) != 0; };
    warp = *std::ranges::find_if(rank_of_warps_, ready);
  }
  const unsigned lane = any_member(ready_lanes_[warp], *random_);
  ready_lanes_[warp] &= ~(1u << lane);
  if (ready_lanes_[warp] == 0) ready_warps_ &= ~(1u << warp);
  return threads_[warp * warp_lanes + lane];
}

void Block::suspend() {
  Thread& self = *current_;
  Thread& successor = next();
  if (&successor == &self) return;
  enter(successor);
  Fiber::switch_to(self.fiber, successor.fiber);
}

void Block::yield() {
  if (++idle_turns_ > patience) fail<Deadlock>("the block has made no progress for a long time; threads spin");
  // A warp ahead of the others would spin for ever on what they have to do first.
  if (!rank_of_warps_.empty() && idle_turns_ % 64 == 0) random_->shuffle(rank_of_warps_);
  make_ready(*current_);
  suspend();
}

int Block::barrier(const char* intrinsic, bool predicate, Location where) {
  Thread& self = *current_;
  self.state = Thread::State::at_barrier;
  self.intrinsic = intrinsic;
  self.where = where;
  arrived_with_predicate_ += predicate;
  suspend();
  return barrier_count_;
}

const Lanes& Block::exchange(const char* intrinsic, uint32_t mask, uint64_t value, Location where, bool orders_memory) {
  Thread& self = *current_;
  self.intrinsic = intrinsic;
  self.where = where;
  self.mask = mask;
  self.given = value;
  if ((mask >> self.lane() & 1u) == 0)
    fail<MissingLane>(activity(self) + ", whose mask leaves out this lane, " + std::to_string(self.lane()));
  self.state = Thread::State::in_exchange;
  complete_if_last(self, orders_memory);
  suspend();
  return self.received;
}

void Block::complete_if_last(const Thread& last, bool orders_memory) {
  uint32_t arrived = 0;
  for (unsigned lane = 0; lane < warp_lanes; ++lane) {
    const Thread* other = at(last.warp(), lane);
    if ((last.mask >> lane & 1u) == 0 || other == nullptr || other->state != Thread::State::in_exchange) continue;
    if (other->mask != last.mask || !same_call(*other, last)) {
      // It may be on its way here, unless it waits for this lane in turn.
      if ((other->mask >> last.lane() & 1u) == 0) continue;
      fail<MissingLane>(activity(last) + ", but " + name(*other) + ", whom the mask names, " + activity(*other));
    }
    arrived |= 1u << lane;
  }
  if (arrived != last.mask) return;

  Lanes all{};
  for (unsigned lane = 0; lane < warp_lanes; ++lane)
    if ((arrived >> lane & 1u) != 0) all[lane] = at(last.warp(), lane)->given;
  for (unsigned lane = 0; lane < warp_lanes; ++lane) {
    if ((arrived >> lane & 1u) == 0) continue;
    Thread& member = *at(last.warp(), lane);
    member.received = all;
    make_ready(member);
  }
  if (orders_memory) ordering_.warp_barrier(last.warp(), arrived);
  note_progress();
}

void Block::resolve_stall() {
  Thread* at_barrier = nullptr;
  for (Thread& thread : threads_) {
    if (thread.state == Thread::State::in_exchange) report_missing_lane(thread);
    if (thread.state == Thread::State::at_barrier && at_barrier == nullptr) at_barrier = &thread;
  }
  for (const Thread& thread : threads_)
    if (thread.state == Thread::State::exited || !same_call(thread, *at_barrier))
      report_divergence(*at_barrier, thread);
  release_barrier();
}

void Block::release_barrier() {
  barrier_count_ = arrived_with_predicate_;
  arrived_with_predicate_ = 0;
  ordering_.block_barrier();
  note_progress();
  for (Thread& thread : threads_) make_ready(thread);
}

void Block::report_missing_lane(Thread& waiting) {
  // Whoever comes last finds the stall, and that may be the thread that is missing.
  enter(waiting);
  const auto waits_too = [&](unsigned lane) {
    const Thread* other = at(waiting.warp(), lane);
    return other != nullptr && other->state == Thread::State::in_exchange && other->mask == waiting.mask;
  };
  unsigned lane = std::countr_zero(waiting.mask);
  while ((waiting.mask >> lane & 1u) == 0 || waits_too(lane)) ++lane;
  const Thread* absent = at(waiting.warp(), lane);
  fail<MissingLane>(activity(waiting) + " for lane " + std::to_string(lane) +
                    (absent != nullptr ? ", but " + name(*absent) + " " + activity(*absent)
                                       : std::string(", which this block does not have")));
}

void Block::report_divergence(Thread& waiting, const Thread& other) {
  enter(waiting);
  fail<DivergentBarrier>(activity(waiting) + " for all threads of the block, but " + name(other) + " " +
                         activity(other));
}

void Block::check(SharedMemory::Kind kind, const void* address, size_t bytes) {
  const auto finding = shared_.access(kind, address, bytes, current_->rank, ordering_);
  if (!finding) return;
  switch (finding->fault) {
    case SharedMemory::Fault::bounds:
      fail<OutOfBounds>(finding->what + ", out of bounds");
    case SharedMemory::Fault::uninitialized:
      fail<UninitializedShared>(finding->what + ", which no thread of this block has written so far");
    case SharedMemory::Fault::race: {
      const Thread& other = threads_[*finding->other_thread];
      const char* missing =
          other.warp() == current_->warp() ? " with no __syncwarp between" : " with no __syncthreads between";
      fail<MissingBarrier>(finding->what + " by " + name(other) + missing);
    }
  }
}

Thread* Block::at(unsigned warp, unsigned lane) {
  const unsigned rank = warp * warp_lanes + lane;
  return rank < threads_.size() ? &threads_[rank] : nullptr;
}

std::string Block::prefix() const {
  return std::string(launch_->kernel) + ", block " + to_text(block_index) + ", " + name(*current_) + ": ";
}

std::string Block::name(const Thread& thread) const { return "thread " + to_text(thread.index); }

std::string Block::activity(const Thread& thread) const {
  switch (thread.state) {
    case Thread::State::exited:
      return "has exited";
    case Thread::State::at_barrier:
      return "waits in " + std::string(thread.intrinsic) + " at " +
             file_and_line(thread.where.file_name(), thread.where.line());
    default:
      return "waits in " + std::string(thread.intrinsic) + "(" + to_hex(thread.mask) + ") at " +
             file_and_line(thread.where.file_name(), thread.where.line());
  }
}

}  // namespace simt
