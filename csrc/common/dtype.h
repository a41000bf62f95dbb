// The dtypes that operators take.
#pragma once

namespace fewshot_ext {

enum class Dtype : int { float32, float64, bfloat16, float16 };

}  // namespace fewshot_ext
