// Device math. The fast intrinsics are as accurate as the C library here; their error shows on a GPU alone.
#pragma once

// Not <cmath>, so that exp(float) outside of std is the overload for float, and isnan is there at all.
#include <math.h>

#include <bit>
#include <cstdint>

namespace simt {

inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }
inline double reciprocal_root(double x) { return 1.0 / std::sqrt(x); }
inline float exp10_float(float x) { return std::pow(10.0f, x); }
inline void sincos_float(float x, float* sine, float* cosine) {
  *sine = std::sin(x);
  *cosine = std::cos(x);
}

}  // namespace simt

// Macros, because C libraries declare some of these names for themselves.
#define rsqrtf(x) ::simt::reciprocal_root(static_cast<float>(x))
#define rsqrt(x) ::simt::reciprocal_root(x)
#define __expf(x) ::expf(x)
#define __exp10f(x) ::simt::exp10_float(x)
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)
#define __log10f(x) ::log10f(x)
#define __sinf(x) ::sinf(x)
#define __cosf(x) ::cosf(x)
#define __tanf(x) ::tanf(x)
#define __powf(x, y) ::powf(x, y)
#define __sincosf(x, sine, cosine) ::simt::sincos_float(x, sine, cosine)

inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return std::fma(x, y, z); }

// On a GPU these keep the compiler from contracting; here the kernels are compiled without contraction.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// Signed integers become unsigned where they meet such.
#define SIMT_MIN_MAX(result, first, second)                              \
  constexpr result min(first a, second b) {                              \
    const result x = static_cast<result>(a), y = static_cast<result>(b); \
    return y < x ? y : x;                                                \
  }                                                                      \
  constexpr result max(first a, second b) {                              \
    const result x = static_cast<result>(a), y = static_cast<result>(b); \
    return x < y ? y : x;                                                \
  }

#define SIMT_MIN_MAX_INTEGERS(type)                         \
  SIMT_MIN_MAX(type, type, type)                            \
  SIMT_MIN_MAX(unsigned type, unsigned type, unsigned type) \
  SIMT_MIN_MAX(unsigned type, unsigned type, type)          \
  SIMT_MIN_MAX(unsigned type, type, unsigned type)

SIMT_MIN_MAX_INTEGERS(int)
SIMT_MIN_MAX_INTEGERS(long)
SIMT_MIN_MAX_INTEGERS(long long)

#undef SIMT_MIN_MAX_INTEGERS
#undef SIMT_MIN_MAX

// A NaN loses against a number, as on a GPU.
#define SIMT_MIN_MAX(result, first, second)                        \
  inline result min(first a, second b) { return std::fmin(a, b); } \
  inline result max(first a, second b) { return std::fmax(a, b); }

SIMT_MIN_MAX(float, float, float)
SIMT_MIN_MAX(double, double, double)
SIMT_MIN_MAX(double, float, double)
SIMT_MIN_MAX(double, double, float)

#undef SIMT_MIN_MAX
