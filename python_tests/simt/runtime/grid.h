// The blocks of a launch: one after another, or all at once if they wait for each other.
#pragma once

#include <memory>
#include <vector>

#include "runtime/block.h"
#include "runtime/fiber.h"
#include "runtime/shared_memory.h"

namespace simt {

class Grid {
 public:
  // One serves all launches, because stacks are dear to make. Launches come one at a time.
  static Grid& instance();

  void run_one_by_one(Launch& launch);
  void run_together(Launch& launch);

 private:
  void make_room(size_t blocks, size_t threads);

  Fiber launcher_ = Fiber::of_this_thread();
  Fibers fibers_;
  SharedSpace space_;
  std::vector<std::unique_ptr<Block>> blocks_;
};

}  // namespace simt
