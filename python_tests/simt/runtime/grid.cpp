#include "runtime/grid.h"

#include <algorithm>
#include <functional>
#include <span>
#include <string>

namespace simt {

namespace {

// An H100: what bounds how many blocks are alive at once.
namespace device {
constexpr uint64_t multiprocessors = 132;
constexpr uint64_t blocks = 32;  // of a multiprocessor, as the following
constexpr uint64_t threads = 2048;
constexpr uint64_t shared_bytes = 228 << 10;
constexpr uint64_t reserved_shared_bytes = 1 << 10;  // for each block
}  // namespace device
static_assert(device::multiprocessors * device::blocks <= SharedSpace::slots);

// Each takes a stack, and with its guard two of the 65530 mappings that Linux gives a process.
constexpr uint64_t most_live_threads = 16384;

uint64_t volume(dim3 shape) { return uint64_t{shape.x} * shape.y * shape.z; }

uint3 unflatten(uint64_t i, dim3 shape) {
  return {static_cast<unsigned>(i % shape.x), static_cast<unsigned>(i / shape.x % shape.y),
          static_cast<unsigned>(i / shape.x / shape.y)};
}

[[noreturn]] void refuse(const Launch& launch, const std::string& what) {
  throw LaunchError(std::string(launch.kernel) + ": " + what);
}

void check_shape(const Launch& launch) {
  const dim3 grid = launch.grid;
  const uint64_t threads = volume(launch.block);
  if (threads == 0 || threads > 1024 || launch.block.z > 64)
    refuse(launch, "a block has 1 to 1024 threads, at most 64 of them in z");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) refuse(launch, "the grid is empty");
  if (grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu)
    refuse(launch, "a grid has at most 2^31 - 1 blocks in x and 65535 in y and z");
}

void check_residency(const Launch& launch) {
  const uint64_t blocks = volume(launch.grid), threads = volume(launch.block);
  const uint64_t whole_warps = (threads + warp_lanes - 1) / warp_lanes * warp_lanes;
  const uint64_t resident = device::multiprocessors * std::min(device::blocks, device::threads / whole_warps);
  if (blocks > resident)
    refuse(launch, "a cooperative grid of " + std::to_string(blocks) + " blocks, but at most " +
                       std::to_string(resident) + " of " + std::to_string(threads) + " threads are resident at once");
  if (blocks * threads > most_live_threads)
    refuse(launch, "a cooperative grid of " + std::to_string(blocks * threads) +
                       " threads, but the emulator takes at most " + std::to_string(most_live_threads));
}

// What is left to each of the blocks that have to share a multiprocessor.
size_t shared_limit_of_resident(uint64_t blocks) {
  const uint64_t sharing = (blocks + device::multiprocessors - 1) / device::multiprocessors;
  return device::shared_bytes / sharing - device::reserved_shared_bytes;
}

using Blocks = std::span<const std::unique_ptr<Block>>;

void run_until_all_wait(Blocks blocks, Random& random) {
  std::vector<Block*> ready;
  for (const auto& block : blocks) ready.push_back(block.get());
  while (!ready.empty()) {
    Block*& any = ready[random.below(ready.size())];
    any->resume();
    if (any->state() == Block::State::ready) continue;
    any = ready.back();
    ready.pop_back();
  }
}

// False where all have exited instead.
bool release_grid_barrier(Blocks blocks) {
  const auto waits = [](const auto& block) { return block->state() == Block::State::at_grid_barrier; };
  const auto first = std::ranges::find_if(blocks, waits);
  if (first == blocks.end()) return false;
  for (const auto& block : blocks) (*first)->check_grid_barrier(*block);
  for (const auto& block : blocks) block->release_barrier();
  return true;
}

}  // namespace

Grid& Grid::instance() {
  static Grid grid;
  return grid;
}

void Grid::make_room(size_t blocks, size_t threads) {
  fibers_.reserve(threads);
  while (blocks_.size() < blocks) blocks_.push_back(std::make_unique<Block>(launcher_, space_, blocks_.size()));
}

void Grid::run_one_by_one(Launch& launch) {
  make_room(1, volume(launch.block));
  std::vector<uint64_t> order(volume(launch.grid));
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  launch.random.shuffle(order);
  for (const uint64_t i : order) {
    blocks_.front()->start(launch, unflatten(i, launch.grid), fibers_, 0);
    blocks_.front()->resume();
  }
}

void Grid::run_together(Launch& launch) {
  const uint64_t count = volume(launch.grid), threads = volume(launch.block);
  make_room(count, count * threads);
  const std::span blocks(blocks_.data(), count);
  for (uint64_t i = 0; i < count; ++i) blocks[i]->start(launch, unflatten(i, launch.grid), fibers_, i * threads);
  do {
    run_until_all_wait(blocks, launch.random);
  } while (release_grid_barrier(blocks));
}

namespace {
std::optional<uint64_t> fixed_sums;
}

void fix_sums(std::optional<uint64_t> seed) { fixed_sums = seed; }

void launch(LaunchKind kind, const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, uint64_t seed,
            const std::function<void()>& thread) {
  Launch launch = {.kernel = kernel,
                   .grid = grid,
                   .block = block,
                   .dynamic_shared_bytes = dynamic_shared_bytes,
                   .thread = thread,
                   .kind = kind,
                   .skewed = seed % 2 != 0,
                   .interleaved = seed / 2 % 2 != 0,
                   .cuts_off = (seed + seed / 2) % 2 != 0,
                   .random = Random(seed)};
  if (fixed_sums) {
    launch.cuts_off = *fixed_sums % 2 != 0;
    launch.sums = Random(*fixed_sums);
  }
  if (Block::running() != nullptr) refuse(launch, "launched from a kernel");
  check_shape(launch);
  if (launch.cooperative()) {
    check_residency(launch);
    launch.shared_limit = shared_limit_of_resident(volume(grid));
  }
  if (dynamic_shared_bytes > launch.shared_limit)
    refuse(launch, std::to_string(dynamic_shared_bytes) + " bytes of dynamic shared memory, but a block gets at most " +
                       std::to_string(launch.shared_limit) + (launch.cooperative() ? " in so large a grid" : ""));
  grid_shape = grid;
  block_shape = block;
  if (launch.cooperative())
    Grid::instance().run_together(launch);
  else
    Grid::instance().run_one_by_one(launch);
}

}  // namespace simt
