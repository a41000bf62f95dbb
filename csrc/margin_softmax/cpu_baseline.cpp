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

#define FEWSHOT_EXT_ISA baseline
#define FEWSHOT_EXT_VECTOR_BYTES 16
#include "margin_softmax/cpu_run.h"
