// bfloat16 and float16 as storage. Written without branches on the common road, so that loops over them
// vectorize; GPUs have instructions for it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "common/host_device.h"

namespace fewshot_ext {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class To, class From>
FEWSHOT_EXT_HOST_DEVICE inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

FEWSHOT_EXT_HOST_DEVICE inline float to_accumulate(BFloat16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

FEWSHOT_EXT_HOST_DEVICE inline float to_accumulate(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(bit_cast<__half>(x));
#else
  // Exponent and mantissa moved into place read as 2^-112 times the value, subnormals included.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(scaled | special | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
#endif
}

FEWSHOT_EXT_HOST_DEVICE inline float to_accumulate(float x) { return x; }
FEWSHOT_EXT_HOST_DEVICE inline double to_accumulate(double x) { return x; }

template <class Storage>
FEWSHOT_EXT_HOST_DEVICE inline Storage from_accumulate(float x);
template <class Storage>
FEWSHOT_EXT_HOST_DEVICE inline Storage from_accumulate(double x);

template <>
FEWSHOT_EXT_HOST_DEVICE inline float from_accumulate<float>(float x) {
  return x;
}
template <>
FEWSHOT_EXT_HOST_DEVICE inline double from_accumulate<double>(double x) {
  return x;
}

template <>
FEWSHOT_EXT_HOST_DEVICE inline BFloat16 from_accumulate<BFloat16>(float x) {
#if defined(__CUDA_ARCH__)
  return bit_cast<BFloat16>(__float2bfloat16_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return {static_cast<uint16_t>(x == x ? rounded : 0x7fc0u)};
#endif
}

template <>
FEWSHOT_EXT_HOST_DEVICE inline Float16 from_accumulate<Float16>(float x) {
#if defined(__CUDA_ARCH__)
  return bit_cast<Float16>(__float2half_rn(x));
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = bits & 0x80000000u;
  const float magnitude = bit_cast<float>(bits ^ sign);
  uint32_t half;
  if (!(magnitude < 65520.0f)) {  // rounds to infinity, or is NaN
    half = magnitude == magnitude ? 0x7c00u : 0x7e00u;
  } else if (magnitude < 0x1p-14f) {
    // Adding 0.5 leaves the subnormal's bits, rounded by the addition itself, at the end of the mantissa.
    half = bit_cast<uint32_t>(magnitude + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    const uint32_t rebiased = bit_cast<uint32_t>(magnitude) - (112u << 23);
    half = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(half | (sign >> 16))};
#endif
}

}  // namespace fewshot_ext
