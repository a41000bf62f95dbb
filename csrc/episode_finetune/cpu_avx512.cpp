#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/half.h"
#include "common/isa.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "episode_finetune/problem.h"

#if defined(__x86_64__)
#define FEWSHOT_EXT_ISA avx512
#define FEWSHOT_EXT_VECTOR_BYTES 64
FEWSHOT_EXT_TARGET_BEGIN("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#include "episode_finetune/cpu_kernel.h"
FEWSHOT_EXT_TARGET_END
#endif
