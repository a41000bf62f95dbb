#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/cancellation.h"
#include "common/denormals.h"
#include "common/half.h"
#include "common/isa.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "emd/problem.h"

#define FEWSHOT_EXT_ISA baseline
#define FEWSHOT_EXT_VECTOR_BYTES 16
#include "emd/cpu_kernel.h"
