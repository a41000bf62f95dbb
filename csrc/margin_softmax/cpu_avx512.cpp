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
#include "margin_softmax/problem.h"
#include "margin_softmax/row_math.h"

#if defined(__x86_64__)
#define FEWSHOT_EXT_ISA avx512
#define FEWSHOT_EXT_VECTOR_BYTES 64
FEWSHOT_EXT_TARGET_BEGIN(FEWSHOT_EXT_AVX512)
#include "margin_softmax/cpu_run.h"
FEWSHOT_EXT_TARGET_END
#endif
