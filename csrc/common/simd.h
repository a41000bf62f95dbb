// Vectors without intrinsics (GCC and Clang vector extensions), and the little that kernels do with them.
// Included inside FEWSHOT_EXT_TARGET_BEGIN ... END; see isa.h.
#pragma once

#include "common/isa.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

template <class T>
struct Simd {
  static constexpr int lanes = FEWSHOT_EXT_VECTOR_BYTES / static_cast<int>(sizeof(T));
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  using Uint = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  typedef T Vector __attribute__((vector_size(FEWSHOT_EXT_VECTOR_BYTES)));
  typedef Int IntVector __attribute__((vector_size(FEWSHOT_EXT_VECTOR_BYTES)));  // also the type of a comparison
  typedef Uint UintVector __attribute__((vector_size(FEWSHOT_EXT_VECTOR_BYTES)));
};

template <class T>
using Vector = typename Simd<T>::Vector;

template <class T>
FEWSHOT_EXT_INLINE Vector<T> load(const T* from) {
  Vector<T> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class T>
FEWSHOT_EXT_INLINE typename Simd<T>::IntVector load_int(const typename Simd<T>::Int* from) {
  typename Simd<T>::IntVector v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class T, class V>
FEWSHOT_EXT_INLINE void store(T* to, const V& v) {
  std::memcpy(to, &v, sizeof(v));
}

template <class T>
FEWSHOT_EXT_INLINE Vector<T> splat(T x) {
  return Vector<T>{} + x;
}

template <class T>
FEWSHOT_EXT_INLINE T horizontal_sum(const Vector<T>& v) {
  T lanes[Simd<T>::lanes];
  store(lanes, v);
  for (int width = Simd<T>::lanes / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  return lanes[0];
}

// Each lane gets the value of the lane that lies `distance`, a power of two, away.
template <class T, int distance, int... lane>
FEWSHOT_EXT_INLINE Vector<T> swap_lanes(const Vector<T>& v, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, (lane ^ distance)...);
#else
  constexpr typename Simd<T>::IntVector order = {(lane ^ distance)...};
  return __builtin_shuffle(v, order);
#endif
}

template <class T, int distance>
FEWSHOT_EXT_INLINE Vector<T> swap_lanes(const Vector<T>& v) {
  return swap_lanes<T, distance>(v, std::make_integer_sequence<int, Simd<T>::lanes>());
}

// The sum of all lanes, in each of them.
template <class T, int distance = Simd<T>::lanes / 2>
FEWSHOT_EXT_INLINE Vector<T> sum_in_lanes(const Vector<T>& v) {
  if constexpr (distance == 0)
    return v;
  else
    return sum_in_lanes<T, distance / 2>(v + swap_lanes<T, distance>(v));
}

// The largest of all lanes, in each of them.
template <class T, int distance = Simd<T>::lanes / 2>
FEWSHOT_EXT_INLINE Vector<T> max_in_lanes(const Vector<T>& v) {
  if constexpr (distance == 0) {
    return v;
  } else {
    const Vector<T> other = swap_lanes<T, distance>(v);
    return max_in_lanes<T, distance / 2>(v > other ? v : other);
  }
}

template <class T>
struct InverseFactorials {
  T of[14] = {};
  constexpr InverseFactorials() {
    double value = 1;
    for (int k = 0; k < 14; ++k) {
      of[k] = static_cast<T>(value);
      value /= k + 1;
    }
  }
};

// e^x for x that is not far above 0 (the log-sum-exp road), to about 1 ulp; e^-inf = 0 and NaN stays NaN.
template <class T>
FEWSHOT_EXT_INLINE Vector<T> exp(const Vector<T>& x) {
  using V = Vector<T>;
  using UintVector = typename Simd<T>::UintVector;
  constexpr bool single = sizeof(T) == 4;
  constexpr T log2_e = T(1.4426950408889634074);
  // ln 2 in two parts, the first with trailing zeros so that its product with the exponent is exact.
  constexpr T ln2_high = single ? T(0.693359375) : T(6.93147180369123816490e-01);
  constexpr T ln2_low = single ? T(-2.12194440054690581e-4) : T(1.90821492927058770002e-10);
  constexpr T lowest = single ? T(-87.3) : T(-708.3);
  constexpr T round_to_int = single ? T(0x1.8p23) : T(0x1.8p52);
  constexpr int mantissa_bits = single ? 23 : 52;
  constexpr int degree = single ? 7 : 13;

  const V floor = splat(lowest);
  const auto vanishes = x < floor;
  const V clamped = vanishes ? floor : x;
  const V shifted = clamped * log2_e + round_to_int;
  const V exponent = shifted - round_to_int;
  const V r = clamped - exponent * ln2_high - exponent * ln2_low;
  constexpr InverseFactorials<T> coefficient;
  V polynomial = splat(coefficient.of[degree]);
#pragma GCC unroll 16
  for (int k = degree - 1; k >= 0; --k) polynomial = polynomial * r + coefficient.of[k];
  UintVector bits, scaled;
  std::memcpy(&bits, &shifted, sizeof(bits));  // the low bits of `shifted` hold the exponent as an integer
  std::memcpy(&scaled, &polynomial, sizeof(scaled));
  scaled += bits << mantissa_bits;
  V result;
  std::memcpy(&result, &scaled, sizeof(result));
  result = vanishes ? V{} : result;
  return x == x ? result : x;
}

// Transposes a square of lanes x lanes held in rows[lanes].
template <class T>
struct Transpose {
  using S = Simd<T>;
  static constexpr int lanes = S::lanes;

  template <int Half, bool Upper, int... Lane>
  static FEWSHOT_EXT_INLINE Vector<T> exchange(const Vector<T>& a, const Vector<T>& b,
                                               std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, source<Half, Upper>(Lane)...);
#else
    constexpr typename S::IntVector order = {source<Half, Upper>(Lane)...};
    return __builtin_shuffle(a, b, order);
#endif
  }

  // Which lane of a (0 .. lanes-1) or b (lanes ..) comes to `lane` when blocks of width Half are exchanged.
  template <int Half, bool Upper>
  static constexpr int source(int lane) {
    const bool high = lane & Half;
    if (Upper) return high ? lanes + lane : lane + Half;
    return high ? lanes + lane - Half : lane;
  }

  template <int Half>
  static FEWSHOT_EXT_INLINE void stage(Vector<T>* rows) {
    using Lanes = std::make_integer_sequence<int, lanes>;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & Half) continue;
      const Vector<T> a = rows[i], b = rows[i + Half];
      rows[i] = exchange<Half, false>(a, b, Lanes{});
      rows[i + Half] = exchange<Half, true>(a, b, Lanes{});
    }
    if constexpr (Half * 2 < lanes) stage<Half * 2>(rows);
  }

  static FEWSHOT_EXT_INLINE void run(Vector<T>* rows) { stage<1>(rows); }
};

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
