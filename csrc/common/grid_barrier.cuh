// A barrier of the whole grid. Apart from device.h, because cooperative_groups.h takes nvcc longer than most kernels.
#pragma once

#include "common/device.h"

#if !defined(FEWSHOT_EXT_SIMT)
#include <cooperative_groups.h>
#endif

namespace fewshot_ext {

// Waits for all threads of the grid, and makes visible to all what each has written. Only for cooperative launches.
#if defined(FEWSHOT_EXT_SIMT)
using ::simt::grid_barrier;
#else
__device__ __forceinline__ void grid_barrier() { ::cooperative_groups::this_grid().sync(); }
#endif

}  // namespace fewshot_ext
