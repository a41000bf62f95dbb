#include "simt/runtime.h"

#include <vector>

#include "runtime/block.h"

namespace simt {

unsigned lane() { return Block::instance().current().lane(); }

int block_barrier(const char* intrinsic, bool predicate, Location where) {
  return Block::instance().barrier(intrinsic, predicate, where);
}

void warp_barrier(uint32_t mask, Location where) { Block::instance().exchange("__syncwarp", mask, 0, where, true); }

const Lanes& exchange(const char* intrinsic, uint32_t mask, uint64_t value, Location where) {
  return Block::instance().exchange(intrinsic, mask, value, where, false);
}

uint64_t received_from(unsigned source, const Lanes& values, uint32_t mask, const char* intrinsic, Location where) {
  if ((mask >> source & 1u) == 0)
    Block::instance().fail<MissingLane>(std::string(intrinsic) + " at " +
                                        file_and_line(where.file_name(), where.line()) + " reads lane " +
                                        std::to_string(source) + ", which its mask leaves out");
  return values[source];
}

void atomic_changed_memory() { Block::instance().note_progress(); }

void trap(Location where) {
  Block::instance().fail<Trap>("__trap at " + file_and_line(where.file_name(), where.line()));
}

void* static_shared(const void* identity, const char* name, size_t bytes, size_t element_bytes) {
  Block& block = Block::instance();
  void* memory = block.shared().variable(identity, name, bytes, element_bytes);
  if (memory == nullptr)
    block.fail<LaunchError>(std::string(name) +
                            " takes the block past its limits of shared memory: 48 KiB declared "
                            "statically, 227 KiB in all");
  return memory;
}

void* dynamic_shared() { return Block::instance().shared().dynamic(); }

void launch(const char* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, uint64_t seed,
            const std::function<void()>& thread) {
  const auto refuse = [&](const char* what) { throw LaunchError(std::string(kernel) + ": " + what); };
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64) refuse("a block has 1 to 1024 threads, at most 64 of them in z");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) refuse("the grid is empty");
  if (grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu)
    refuse("a grid has at most 2^31 - 1 blocks in x and 65535 in y and z");
  if (dynamic_shared_bytes > SharedMemory::total_limit) refuse("more than 227 KiB of dynamic shared memory");
  if (Block::instance().running()) refuse("launched from a kernel");

  block_shape = block;
  grid_shape = grid;
  Random random(seed);
  std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  random.shuffle(order);
  const Launch launch{kernel, grid, block, dynamic_shared_bytes, thread};
  for (const uint64_t i : order) {
    const uint3 index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                         static_cast<unsigned>(i / grid.x / grid.y)};
    Block::instance().run(launch, index, seed % 2 != 0, random);
  }
}

}  // namespace simt
