// The correct kernels as CUDA, compiled by a test and never linked.
#include "cooperative_kernels.cuh"
#include "kernels.cuh"
#include "matrix_kernels.cuh"

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
template __global__ void multiply_by_layout<Float16, Way::right>(const Float16*, const Float16*, float*, int);
template __global__ void multiply_by_layout<float, Way::threefold>(const float*, const float*, float*, int);
template __global__ void multiply_loaded<BFloat16, Stored::by_columns, Stored::by_rows>(const BFloat16*,
                                                                                        const BFloat16*, float*, int);
template __global__ void multiply_loaded<float, Stored::by_rows, Stored::by_columns>(const float*, const float*, float*,
                                                                                     int);
template __global__ void multiply_pipelined<1, true, true>(const BFloat16*, const BFloat16*, float*, int, int);

}  // namespace fewshot_ext
