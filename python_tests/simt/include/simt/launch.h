// Runs a kernel: simt::launch<kernel<float>>(grid, block, dynamic_shared_bytes, seed, arguments...), or with
// simt::launch_cooperative one whose blocks wait for each other.
#pragma once

#include <cstring>
#include <string>

#include "simt/runtime.h"

namespace simt {

// The kernel's name as the source spells it, template arguments included.
template <auto kernel>
std::string name_of() {
  const std::string signature = __PRETTY_FUNCTION__;
  const size_t begin = signature.find("kernel = ") + std::strlen("kernel = ");
  return signature.substr(begin, signature.find_first_of(";]", begin) - begin);
}

// One block after another. The seed decides the order of the blocks and how threads take turns: under even
// seeds all advance alike, under odd ones some warps run as far ahead as barriers let them. Errors derive
// from KernelError.
template <auto kernel, class... Arguments>
void launch(dim3 grid, dim3 block, size_t dynamic_shared_bytes, uint64_t seed, const Arguments&... arguments) {
  launch(LaunchKind::plain, name_of<kernel>().c_str(), grid, block, dynamic_shared_bytes, seed,
         [&] { kernel(arguments...); });
}

// All blocks at once, as cudaLaunchCooperativeKernel does it. The seed decides which block goes on: one until it waits
// for others, or under every other pair of seeds (2 and 3 of 4) also any other one in between.
template <auto kernel, class... Arguments>
void launch_cooperative(dim3 grid, dim3 block, size_t dynamic_shared_bytes, uint64_t seed,
                        const Arguments&... arguments) {
  launch(LaunchKind::cooperative, name_of<kernel>().c_str(), grid, block, dynamic_shared_bytes, seed,
         [&] { kernel(arguments...); });
}

}  // namespace simt
