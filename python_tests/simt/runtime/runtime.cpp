#include "simt/runtime.h"

#include "runtime/block.h"
#include "simt/matrix.h"

namespace simt {

unsigned lane() { return Block::running()->current().lane(); }

int block_barrier(const char* intrinsic, bool predicate, Location where) {
  return Block::running()->barrier(intrinsic, predicate, where);
}

void grid_barrier(Location where) { Block::running()->grid_barrier("grid_barrier", where); }

void warp_barrier(uint32_t mask, Location where) { Block::running()->exchange("__syncwarp", mask, 0, where, true); }

const Lanes& exchange(const char* intrinsic, uint32_t mask, uint64_t value, Location where) {
  return Block::running()->exchange(intrinsic, mask, value, where, false);
}

uint64_t received_from(unsigned source, const Lanes& values, uint32_t mask, const char* intrinsic, Location where) {
  if ((mask >> source & 1u) == 0)
    Block::running()->fail<MissingLane>(std::string(intrinsic) + " at " + file_and_line(where) + " reads lane " +
                                        std::to_string(source) + ", which its mask leaves out");
  return values[source];
}

void cp_async(void* shared, const void* global, int bytes, Location where) {
  Block::running()->start_copy("cp_async", shared, global, bytes, where);
}

void cp_async_commit() { Block::running()->commit_copies(); }

void cp_async_wait(int pending) { Block::running()->wait_for_copies(static_cast<uint64_t>(pending)); }

void atomic_changed_memory() { Block::running()->note_progress(); }

void trap(Location where) { Block::running()->fail<Trap>("__trap at " + file_and_line(where)); }

void* static_shared(const void* identity, const char* name, size_t bytes, size_t element_bytes, size_t alignment) {
  Block& block = *Block::running();
  void* memory = block.shared().variable(identity, name, bytes, element_bytes, alignment);
  if (memory == nullptr)
    block.fail<LaunchError>(std::string(name) + " takes the block past its limits of shared memory: " +
                            std::to_string(SharedMemory::static_limit) + " bytes declared statically, " +
                            std::to_string(block.shared().limit()) + " in all");
  return memory;
}

void* dynamic_shared() { return Block::running()->shared().dynamic(); }

}  // namespace simt
