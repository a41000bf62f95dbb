// What a warp multiplies small matrices with: mma.sync, the loads that bring its operands into registers, and copies
// that run meanwhile.
//
// Under nvcc each function that is not built from others here is one instruction of PTX, for compute capability 8.0 and
// later. Under the emulator it is a call of simt/matrix.h, which knows where the PTX ISA puts which element and shares
// no line with what this file says of it. All 32 lanes of the warp have to call mma and ldmatrix together.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/device.h"
#include "common/half.h"
#include "common/host_device.h"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "mma.cuh takes compute capability 8.0 or later"
#endif

namespace fewshot_ext {

// The bits of a float32 of which a product reads sign, exponent and the first 10 bits of the mantissa. To be made by
// round_to_tf32, because the instruction cuts off the rest: that is twice the error, and all to one side.
struct Tf32 {
  uint32_t bits;
};

// D = A B + C, with A of 16 x k elements, B of k x 8, C and D of 16 x 8. k is 16 for BFloat16 and Float16, 8 for Tf32.
//
// A fragment is what one lane holds of a matrix, in 32-bit registers, of which one has two elements of a half type, the
// first in its low bits. Fragments of float are what ldmatrix brings of a matrix that is still to be rounded to Tf32.
template <class T>
struct FragmentA {
  static constexpr int registers = 4;
  uint32_t at[registers];
};

template <class T>
struct FragmentB {
  static constexpr int registers = 2;
  uint32_t at[registers];
};

struct FragmentC {
  float at[4];
};

struct Place {
  int row, column;
};

// Where in its matrix an element of a lane's fragment is. Elements count from the first register's low bits on.
template <class T>
struct MmaLayout {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4);
  static constexpr int packed = 4 / sizeof(T);  // elements of a register
  static constexpr int rows = 16, columns = 8, depth = 8 * packed;
  static constexpr int elements_a = 4 * packed, elements_b = 2 * packed, elements_c = 4;

  // Four lanes share a row, each with one register in the first half of k and one in the second.
  FEWSHOT_EXT_HOST_DEVICE static constexpr Place of_a(int lane, int element) {
    const int in_register = element / packed;
    return {lane / 4 + in_register % 2 * 8, k(lane, in_register / 2, element)};
  }

  FEWSHOT_EXT_HOST_DEVICE static constexpr Place of_b(int lane, int element) {
    return {k(lane, element / packed, element), lane / 4};
  }

  // Of C and D, whatever T is: registers 0 and 1 are neighbors, 2 and 3 are so eight rows below.
  FEWSHOT_EXT_HOST_DEVICE static constexpr Place of_c(int lane, int element) {
    return {lane / 4 + element / 2 * 8, lane % 4 * 2 + element % 2};
  }

  // Where the 16 bytes begin that a lane points ldmatrix to, in a tile in shared memory whose rows are rows of the
  // place:
  //   A stored by rows, [16][depth]                     ldmatrix_x4(a, ...)         row_for_a
  //   two B side by side, stored by columns, [16][depth]  ldmatrix_x4(b0, b1, ...)    row_for_b
  // and for half types also
  //   A stored by columns, [16 of k][16]                ldmatrix_x4_trans(a, ...)   row_for_transposed_a
  //   two B side by side, stored by rows, [16 of k][16]   ldmatrix_x4_trans(b0, b1, ...)  row_for_transposed_b
  FEWSHOT_EXT_HOST_DEVICE static constexpr Place row_for_a(int lane) { return {lane % 16, lane / 16 * chunk}; }
  FEWSHOT_EXT_HOST_DEVICE static constexpr Place row_for_b(int lane) {
    return {lane / 16 * 8 + lane % 8, lane / 8 % 2 * chunk};
  }
  FEWSHOT_EXT_HOST_DEVICE static constexpr Place row_for_transposed_a(int lane) { return row_for_b(lane); }
  FEWSHOT_EXT_HOST_DEVICE static constexpr Place row_for_transposed_b(int lane) { return row_for_a(lane); }

 private:
  static constexpr int chunk = 16 / sizeof(T);  // elements of 16 bytes

  FEWSHOT_EXT_HOST_DEVICE static constexpr int k(int lane, int half, int element) {
    return half * (depth / 2) + lane % 4 * packed + element % packed;
  }
};

// To the nearest, ties away from zero. Beyond the largest tf32 it gives infinity.
__device__ __forceinline__ Tf32 round_to_tf32(float x) {
#if defined(FEWSHOT_EXT_SIMT)
  return {::simt::round_to_tf32(x)};
#else
  Tf32 rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded.bits) : "f"(x));
  return rounded;
#endif
}

template <template <class> class Fragment>
__device__ __forceinline__ Fragment<Tf32> round_to_tf32(const Fragment<float>& x) {
  Fragment<Tf32> rounded;
#pragma unroll
  for (int i = 0; i < Fragment<float>::registers; ++i) rounded.at[i] = round_to_tf32(bit_cast<float>(x.at[i])).bits;
  return rounded;
}

// A float32 as the sum of two tf32, but for what is less than 2^-22 of it.
template <class T>
struct Split {
  T big, small;
};

// Factors that are not finite, or of about 2^115 and more, give NaN.
//
// In three instructions. (2^13 + 1) x, rounded to float32, less 2^13 x is x rounded to the bits of tf32. What is left
// has one bit more than tf32 at most, but where 2^13 x is near a tie. The instruction cuts it off, which errs as much
// as to round it here would: of all floats of one exponent both leave out 0.35 of 2^-23 in the root mean square. Where
// x is not a number, what is left may be one, but `big` is none.
__device__ __forceinline__ Split<Tf32> split_to_tf32(float x) {
  const float big = std::fma(-8192.0f, x, 8193.0f * x);
  return {{bit_cast<uint32_t>(big)}, {bit_cast<uint32_t>(x - big)}};
}

template <template <class> class Fragment>
__device__ __forceinline__ Split<Fragment<Tf32>> split_to_tf32(const Fragment<float>& x) {
  Split<Fragment<Tf32>> parts;
#pragma unroll
  for (int i = 0; i < Fragment<float>::registers; ++i) {
    const Split<Tf32> part = split_to_tf32(bit_cast<float>(x.at[i]));
    parts.big.at[i] = part.big.bits;
    parts.small.at[i] = part.small.bits;
  }
  return parts;
}

// c += a b. In which order and with which rounding the hardware adds is not specified, and it need not round to
// nearest.
#if defined(FEWSHOT_EXT_SIMT)
#define FEWSHOT_EXT_MMA(twin, instruction) ::simt::twin(c.at, a.at, b.at, caller)
#else
#define FEWSHOT_EXT_MMA(twin, instruction)                                                                         \
  asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                  \
               : "=f"(c.at[0]), "=f"(c.at[1]), "=f"(c.at[2]), "=f"(c.at[3])                                        \
               : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b.at[0]), "r"(b.at[1]), "f"(c.at[0]), \
                 "f"(c.at[1]), "f"(c.at[2]), "f"(c.at[3]))
#endif

__device__ __forceinline__ void mma_m16n8k16(FragmentC& c, const FragmentA<BFloat16>& a, const FragmentB<BFloat16>& b,
                                             Caller caller = Caller::current()) {
  FEWSHOT_EXT_MMA(mma_bfloat16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
}

__device__ __forceinline__ void mma_m16n8k16(FragmentC& c, const FragmentA<Float16>& a, const FragmentB<Float16>& b,
                                             Caller caller = Caller::current()) {
  FEWSHOT_EXT_MMA(mma_float16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}

__device__ __forceinline__ void mma_m16n8k8(FragmentC& c, const FragmentA<Tf32>& a, const FragmentB<Tf32>& b,
                                            Caller caller = Caller::current()) {
  FEWSHOT_EXT_MMA(mma_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
}

#undef FEWSHOT_EXT_MMA

// The same for factors of float32, in three instructions: what these leave out is less than 2^-20 of a product, and
// mostly no more than its rounding to float32 is. The small terms come first, before c grows by the big ones.
//
// Tensor cores cut sums off, so that a long sum of terms of one sign drifts. As exact as float32 is one in slabs: let c
// sum up a few dozen of k, and add that to a float by an ordinary addition. The emulator's test_matrix.py compares
// both.
__device__ __forceinline__ void mma_m16n8k8(FragmentC& c, const Split<FragmentA<Tf32>>& a,
                                            const Split<FragmentB<Tf32>>& b, Caller caller = Caller::current()) {
  mma_m16n8k8(c, a.small, b.big, caller);
  mma_m16n8k8(c, a.big, b.small, caller);
  mma_m16n8k8(c, a.big, b.big, caller);
}

// Four matrices of 8 x 16 bytes from shared memory. Lane i points to a row of matrix i / 8, aligned to 16 bytes;
// register m of lane i gets bytes i % 4 * 4 and on of row i / 4 of matrix m. Orders no memory: between other lanes'
// writes and this, and between this and later ones, there has to be a barrier.
__device__ __forceinline__ void ldmatrix_x4(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, const void* row,
                                            Caller caller = Caller::current()) {
#if defined(FEWSHOT_EXT_SIMT)
  ::simt::ldmatrix_x4(r0, r1, r2, r3, row, caller);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// The same of matrices of 8 x 8 halves, each transposed: register m of lane i gets column i / 4, rows i % 4 * 2 and the
// next.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3,
                                                  const void* row, Caller caller = Caller::current()) {
#if defined(FEWSHOT_EXT_SIMT)
  ::simt::ldmatrix_x4_trans(r0, r1, r2, r3, row, caller);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

template <class T>
__device__ __forceinline__ void ldmatrix_x4(FragmentA<T>& a, const T* row, Caller caller = Caller::current()) {
  ldmatrix_x4(a.at[0], a.at[1], a.at[2], a.at[3], row, caller);
}

template <class T>
__device__ __forceinline__ void ldmatrix_x4(FragmentB<T>& left, FragmentB<T>& right, const T* row,
                                            Caller caller = Caller::current()) {
  ldmatrix_x4(left.at[0], left.at[1], right.at[0], right.at[1], row, caller);
}

template <class T>
__device__ __forceinline__ void ldmatrix_x4_trans(FragmentA<T>& a, const T* row, Caller caller = Caller::current()) {
  static_assert(sizeof(T) == 2, "a transposed load would take a 32-bit element apart");
  ldmatrix_x4_trans(a.at[0], a.at[1], a.at[2], a.at[3], row, caller);
}

template <class T>
__device__ __forceinline__ void ldmatrix_x4_trans(FragmentB<T>& left, FragmentB<T>& right, const T* row,
                                                  Caller caller = Caller::current()) {
  static_assert(sizeof(T) == 2, "a transposed load would take a 32-bit element apart");
  ldmatrix_x4_trans(left.at[0], left.at[1], right.at[0], right.at[1], row, caller);
}

// Has 16 bytes copied, both sides aligned to them, while the thread goes on. Until its own cp_async_wait nobody may
// touch the destination, and other threads not before a barrier after that.
__device__ __forceinline__ void cp_async(void* shared, const void* global, Caller caller = Caller::current()) {
#if defined(FEWSHOT_EXT_SIMT)
  ::simt::cp_async(shared, global, 16, caller);
#else
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global))
      : "memory");
#endif
}

// The same of the first `bytes` of 0 to 16; the others become zero, and what lies there is not read.
__device__ __forceinline__ void cp_async(void* shared, const void* global, int bytes,
                                         Caller caller = Caller::current()) {
#if defined(FEWSHOT_EXT_SIMT)
  ::simt::cp_async(shared, global, bytes, caller);
#else
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global)), "r"(bytes)
      : "memory");
#endif
}

// Makes a group of the thread's copies since the last one; of none, an empty group.
__device__ __forceinline__ void cp_async_commit() {
#if defined(FEWSHOT_EXT_SIMT)
  ::simt::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for the thread's own groups, but for the last `pending` of them.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  static_assert(pending >= 0);
#if defined(FEWSHOT_EXT_SIMT)
  ::simt::cp_async_wait(pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

}  // namespace fewshot_ext
