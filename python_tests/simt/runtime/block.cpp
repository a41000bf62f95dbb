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

// So many turns at atomics that change nothing, without anyone getting past a barrier or to the end.
constexpr uint64_t patience = 10'000'000;
// So often those that spin let others go first.
constexpr uint64_t turns_of_a_spin = 64;
// One in so many turns is the last before another block goes on, where blocks interleave.
constexpr uint64_t turns_of_a_block = 32;

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

std::string file_and_line(Location where) { return file_and_line(where.file_name(), where.line()); }

void Block::start(Launch& launch, uint3 index, Fibers& fibers, size_t first_fiber) {
  launch_ = &launch;
  index_ = index;
  error_ = nullptr;
  const dim3 shape = launch.block;
  alive_ = shape.x * shape.y * shape.z;
  threads_.resize(alive_);
  ready_lanes_ = {};
  ready_warps_ = 0;
  arrived_with_predicate_ = 0;
  rank_of_warps_.clear();
  if (launch.skewed) {
    for (unsigned warp = 0; warp * warp_lanes < alive_; ++warp) rank_of_warps_.push_back(warp);
    launch.random.shuffle(rank_of_warps_);
  }
  note_progress();
  ordering_.begin_block(alive_);
  shared_.begin_block(launch.dynamic_shared_bytes, launch.shared_limit);
  for (unsigned rank = 0; rank < alive_; ++rank) {
    Thread& thread = threads_[rank];
    thread.fiber = &fibers[first_fiber + rank];
    thread.fiber->prepare(run_thread);
    thread.rank = rank;
    thread.copies.clear();
    thread.index = {rank % shape.x, rank / shape.x % shape.y, rank / shape.x / shape.y};
    make_ready(thread);
  }
}

void Block::resume() {
  running_ = this;
  block_index = index_;
  Fiber::switch_to(launcher_, next_thread());
  running_ = nullptr;
  if (error_) std::rethrow_exception(error_);
}

Block::State Block::state() const {
  if (alive_ == 0) return State::exited;
  return ready_warps_ == 0 ? State::at_grid_barrier : State::ready;
}

void Block::run_thread() {
  Fiber::arrived();
  running_->launch_->thread();
  Block& block = *running_;
  Thread& self = *block.current_;
  if (!self.copies.empty())
    block.fail<PendingCopy>("exits and has not waited for its cp_async at " + file_and_line(self.copies.first().where));
  self.state = Thread::State::exited;
  --block.alive_;
  block.note_progress();
  Fiber::leave(*self.fiber, block.next());
}

void Block::stop(std::exception_ptr error) {
  error_ = std::move(error);
  Fiber::leave(*current_->fiber, launcher_);
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

Fiber& Block::next_thread() {
  unsigned warp;
  if (rank_of_warps_.empty()) {
    warp = any_member(ready_warps_, launch_->random);
  } else {
    const auto ready = [this](unsigned candidate) { return (ready_warps_ >> candidate & 1u) != 0; };
    warp = *std::ranges::find_if(rank_of_warps_, ready);
  }
  const unsigned lane = any_member(ready_lanes_[warp], launch_->random);
  ready_lanes_[warp] &= ~(1u << lane);
  if (ready_lanes_[warp] == 0) ready_warps_ &= ~(1u << warp);
  Thread& thread = threads_[warp * warp_lanes + lane];
  enter(thread);
  return *thread.fiber;
}

Fiber& Block::next() {
  if (ready_warps_ == 0) resolve_stall();
  if (ready_warps_ == 0 || gives_way()) return launcher_;
  return next_thread();
}

void Block::suspend() {
  Fiber& self = *current_->fiber;
  current_->copies.run_some(launch_->random);
  Fiber& successor = next();
  if (&successor != &self) Fiber::switch_to(self, successor);
}

bool Block::gives_way() {
  if (!launch_->cooperative()) return false;
  const bool spins = launch_->idle_turns % turns_of_a_spin == turns_of_a_spin - 1;
  return spins || (launch_->interleaved && launch_->random.below(turns_of_a_block) == 0);
}

void Block::yield() {
  if (++launch_->idle_turns > patience) fail<Deadlock>("there has been no progress for a long time; threads spin");
  // A warp ahead of the others would spin for ever on what they have to do first.
  if (!rank_of_warps_.empty() && launch_->idle_turns % turns_of_a_spin == 0) launch_->random.shuffle(rank_of_warps_);
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

void Block::grid_barrier(const char* intrinsic, Location where) {
  Thread& self = *current_;
  self.intrinsic = intrinsic;
  self.where = where;
  if (!launch_->cooperative())
    fail<LaunchError>(std::string(intrinsic) + " at " + file_and_line(where) +
                      " needs all blocks at once, and this launch is not cooperative");
  self.state = Thread::State::at_grid_barrier;
  suspend();
}

const Lanes& Block::exchange(const char* intrinsic, uint32_t mask, uint64_t value, Location where, bool orders_memory,
                             Together together) {
  Thread& self = *current_;
  self.intrinsic = intrinsic;
  self.where = where;
  self.mask = mask;
  self.given = value;
  if ((mask >> self.lane() & 1u) == 0)
    fail<MissingLane>(activity(self) + ", whose mask leaves out this lane, " + std::to_string(self.lane()));
  self.state = Thread::State::in_exchange;
  complete_if_last(self, orders_memory, together);
  suspend();
  return self.received;
}

void Block::complete_if_last(const Thread& last, bool orders_memory, Together together) {
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
  if (together != nullptr) together(all, *launch_);
  for (unsigned lane = 0; lane < warp_lanes; ++lane) {
    if ((arrived >> lane & 1u) == 0) continue;
    Thread& member = *at(last.warp(), lane);
    member.received = all;
    make_ready(member);
  }
  if (orders_memory) ordering_.warp_barrier(last.warp(), arrived);
  note_progress();
}

void Block::require_place(const char* intrinsic, const void* address, bool shared, Location where) {
  const std::string call = std::string(intrinsic) + " at " + file_and_line(where);
  if (shared_.is_shared(address) != shared)
    fail<OutOfBounds>(call + " is given an address that is not in " + (shared ? "shared" : "global") +
                      " memory, out of bounds");
  if (const uintptr_t off = reinterpret_cast<uintptr_t>(address) % 16; off != 0)
    fail<Misaligned>(call + " is given an address " + std::to_string(off) + " bytes off its alignment of 16");
}

void Block::start_copy(const char* intrinsic, void* to, const void* from, int bytes, Location where) {
  require_place(intrinsic, to, true, where);
  require_place(intrinsic, from, false, where);
  if (bytes < 0 || bytes > static_cast<int>(AsyncCopy::width))
    fail<OutOfBounds>(std::string(intrinsic) + " at " + file_and_line(where) + " is to read " + std::to_string(bytes) +
                      " of 16 bytes, out of bounds");
  follow(SharedMemory::Kind::copy, to, AsyncCopy::width);
  current_->copies.issue({static_cast<std::byte*>(to), from, static_cast<size_t>(bytes), where});
  current_->copies.run_some(launch_->random);
}

void Block::wait_for_copies(uint64_t pending) {
  for (const AsyncCopy& copy : current_->copies.finish(pending))
    follow(SharedMemory::Kind::arrival, copy.to, AsyncCopy::width);
}

void Block::resolve_stall() {
  if (alive_ == 0) return;
  Thread* waiting = nullptr;
  for (Thread& thread : threads_) {
    if (thread.state == Thread::State::in_exchange) report_missing_lane(thread);
    if (thread.state != Thread::State::exited && waiting == nullptr) waiting = &thread;
  }
  for (const Thread& thread : threads_)
    if (thread.state == Thread::State::exited || !same_call(thread, *waiting)) report_divergence(*waiting, thread);
  // The other barrier is the grid's to release.
  if (waiting->state == Thread::State::at_barrier) release_barrier();
}

void Block::check_grid_barrier(const Block& other) const {
  // Where a block waits for others, all its threads wait in the same place.
  const Thread &mine = threads_.front(), &theirs = other.threads_.front();
  if (other.state() == State::at_grid_barrier && same_call(mine, theirs)) return;
  throw DivergentBarrier(prefix(mine) + activity(mine) + " for all threads of the grid, but block " +
                         to_text(other.index_) + " " + activity(theirs));
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
  const char* whom = waiting.state == Thread::State::at_grid_barrier ? "grid" : "block";
  fail<DivergentBarrier>(activity(waiting) + " for all threads of the " + whom + ", but " + name(other) + " " +
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
    case SharedMemory::Fault::pending: {
      const Thread& other = threads_[*finding->other_thread];
      const AsyncCopy* copy = other.copies.find(address, bytes);
      fail<PendingCopy>(finding->what + ", where a cp_async of " + name(other) + " at " + file_and_line(copy->where) +
                        " is to write, for which it has not waited");
    }
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

std::string Block::prefix(const Thread& thread) const {
  return std::string(launch_->kernel) + ", block " + to_text(index_) + ", " + name(thread) + ": ";
}

std::string Block::name(const Thread& thread) const { return "thread " + to_text(thread.index); }

std::string Block::activity(const Thread& thread) const {
  switch (thread.state) {
    case Thread::State::exited:
      return "has exited";
    case Thread::State::at_barrier:
    case Thread::State::at_grid_barrier:
      return "waits in " + std::string(thread.intrinsic) + " at " + file_and_line(thread.where);
    default:
      return "waits in " + std::string(thread.intrinsic) + "(" + to_hex(thread.mask) + ") at " +
             file_and_line(thread.where);
  }
}

}  // namespace simt
