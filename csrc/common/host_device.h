// What marks a function that both a processor and a GPU run.
#pragma once

#if defined(__CUDACC__)
#define FEWSHOT_EXT_HOST_DEVICE __host__ __device__
#else
#define FEWSHOT_EXT_HOST_DEVICE
#endif
