// One function of common/mma.cuh a kernel, so that a test can read in the PTX what it becomes.
#include "common/mma.cuh"

using namespace fewshot_ext;

#define KERNEL extern "C" __global__ void

KERNEL mma_bfloat16(FragmentC* d, FragmentA<BFloat16> a, FragmentB<BFloat16> b, FragmentC c) {
  mma_m16n8k16(c, a, b);
  *d = c;
}

KERNEL mma_float16(FragmentC* d, FragmentA<Float16> a, FragmentB<Float16> b, FragmentC c) {
  mma_m16n8k16(c, a, b);
  *d = c;
}

KERNEL mma_tf32(FragmentC* d, FragmentA<Tf32> a, FragmentB<Tf32> b, FragmentC c) {
  mma_m16n8k8(c, a, b);
  *d = c;
}

KERNEL mma_threefold(FragmentC* d, FragmentA<Tf32> big_a, FragmentA<Tf32> small_a, FragmentB<Tf32> big_b,
                     FragmentB<Tf32> small_b, FragmentC c) {
  mma_m16n8k8(c, Split<FragmentA<Tf32>>{big_a, small_a}, Split<FragmentB<Tf32>>{big_b, small_b});
  *d = c;
}

KERNEL round_one(Tf32* d, float a) { *d = round_to_tf32(a); }

KERNEL round_a(FragmentA<Tf32>* d, FragmentA<float> a) { *d = round_to_tf32(a); }

KERNEL round_b(FragmentB<Tf32>* d, FragmentB<float> a) { *d = round_to_tf32(a); }

KERNEL split_one(Split<Tf32>* d, float a) { *d = split_to_tf32(a); }

KERNEL ldmatrix_a(FragmentA<BFloat16>* d, int a) { ldmatrix_x4(*d, dynamic_shared<BFloat16>() + a); }

KERNEL ldmatrix_b(FragmentB<BFloat16>* d, int a) { ldmatrix_x4(d[0], d[1], dynamic_shared<BFloat16>() + a); }

KERNEL ldmatrix_trans_a(FragmentA<BFloat16>* d, int a) { ldmatrix_x4_trans(*d, dynamic_shared<BFloat16>() + a); }

KERNEL ldmatrix_trans_b(FragmentB<BFloat16>* d, int a) {
  ldmatrix_x4_trans(d[0], d[1], dynamic_shared<BFloat16>() + a);
}

KERNEL copy_sixteen(const float* a, int to) { cp_async(dynamic_shared<float>() + to, a); }

KERNEL copy_some(const float* a, int to, int bytes) { cp_async(dynamic_shared<float>() + to, a, bytes); }

KERNEL commit() { cp_async_commit(); }

KERNEL wait_for_all() { cp_async_wait<0>(); }

KERNEL wait_but_for_three() { cp_async_wait<3>(); }
