// The correct kernels as CUDA, compiled by a test and never linked.
#include "cooperative_kernels.cuh"
#include "kernels.cuh"

namespace fewshot_ext {

template __global__ void sum_rows(const float*, float*, int);
template __global__ void sum_rows(const double*, double*, int);
template __global__ void softmax_rows(const float*, float*, int, int);
template __global__ void softmax_rows(const BFloat16*, BFloat16*, int, int);
template __global__ void softmax_rows(const Float16*, Float16*, int, int);
template __global__ void warp_intrinsics_of(const double*, double*);
template __global__ void warp_intrinsics_of(const int64_t*, int64_t*);
template __global__ void sum_over_grid<true>(const float*, float*, float*);
template __global__ void scan_grid<true>(int*);

}  // namespace fewshot_ext
