// Integers of any width, for arithmetic that must not round: words in two's complement, the lowest first. Included
// inside FEWSHOT_EXT_TARGET_BEGIN ... END; see common/isa.h.
#pragma once

#include "common/host_device.h"
#include "common/isa.h"

namespace fewshot_ext::FEWSHOT_EXT_ISA {

using Word = uint64_t;
using TwoWords = unsigned __int128;
constexpr int64_t bits_of_word = 64;

// The zeros below the lowest bit that is set, and above the highest, of a word other than 0.
FEWSHOT_EXT_HOST_DEVICE FEWSHOT_EXT_INLINE int zeros_below(Word x) {
#if defined(__CUDA_ARCH__)
  return __ffsll(static_cast<long long>(x)) - 1;
#else
  return __builtin_ctzll(x);
#endif
}

FEWSHOT_EXT_HOST_DEVICE FEWSHOT_EXT_INLINE int zeros_above(Word x) {
#if defined(__CUDA_ARCH__)
  return __clzll(static_cast<long long>(x));
#else
  return __builtin_clzll(x);
#endif
}

// a + b + carry, or a - b - carry, and the carry of that.
FEWSHOT_EXT_HOST_DEVICE FEWSHOT_EXT_INLINE Word add_words(Word a, Word b, bool& carry) {
  const TwoWords sum = TwoWords(a) + b + carry;
  carry = static_cast<Word>(sum >> bits_of_word);
  return static_cast<Word>(sum);
}

FEWSHOT_EXT_HOST_DEVICE FEWSHOT_EXT_INLINE Word subtract_words(Word a, Word b, bool& carry) {
  const TwoWords difference = TwoWords(a) - b - carry;
  carry = static_cast<Word>(difference >> bits_of_word);
  return static_cast<Word>(difference);
}

// A double is sign * mantissa * 2^exponent.
struct Binary {
  Word mantissa;
  int64_t exponent;
  bool negative;

  FEWSHOT_EXT_HOST_DEVICE explicit Binary(double x) {
    Word bits;
    std::memcpy(&bits, &x, sizeof(bits));
    constexpr Word hidden = Word(1) << 52;
    const auto biased = static_cast<int64_t>(bits >> 52 & 0x7ff);
    negative = bits >> 63;
    mantissa = biased == 0 ? bits & (hidden - 1) : (bits & (hidden - 1)) | hidden;
    exponent = std::max<int64_t>(biased, 1) - 1075;
  }

  // Exponents of the lowest bit that is set, and of the place above the highest; for numbers other than 0.
  FEWSHOT_EXT_HOST_DEVICE int64_t lowest() const { return exponent + zeros_below(mantissa); }
  FEWSHOT_EXT_HOST_DEVICE int64_t above_highest() const { return exponent + bits_of_word - zeros_above(mantissa); }
};

// The exponents of the bits that a set of doubles needs.
struct BitRange {
  int64_t lowest = std::numeric_limits<int64_t>::max(), above_highest = std::numeric_limits<int64_t>::min();

  FEWSHOT_EXT_HOST_DEVICE void include(double x) {
    const Binary binary(x);
    if (binary.mantissa == 0) return;
    lowest = std::min(lowest, binary.lowest());
    above_highest = std::max(above_highest, binary.above_highest());
  }
  FEWSHOT_EXT_HOST_DEVICE bool empty() const { return lowest > above_highest; }
  FEWSHOT_EXT_HOST_DEVICE int64_t bits() const { return empty() ? 0 : above_highest - lowest; }
  FEWSHOT_EXT_HOST_DEVICE int64_t unit() const { return empty() ? 0 : lowest; }
};

FEWSHOT_EXT_HOST_DEVICE inline int64_t words_for_bits(int64_t bits) {
  return (bits + bits_of_word) / bits_of_word;
}  // the sign included

// The number of bits of a count.
FEWSHOT_EXT_HOST_DEVICE inline int64_t bits_of_count(int64_t count) {
  return bits_of_word - zeros_above(static_cast<Word>(std::max<int64_t>(count, 1)));
}

FEWSHOT_EXT_HOST_DEVICE FEWSHOT_EXT_INLINE void wide_add(Word* to, const Word* x, int64_t words) {
  bool carry = false;
  for (int64_t w = 0; w < words; ++w) to[w] = add_words(to[w], x[w], carry);
}

FEWSHOT_EXT_HOST_DEVICE FEWSHOT_EXT_INLINE void wide_subtract(Word* to, const Word* x, int64_t words) {
  bool borrow = false;
  for (int64_t w = 0; w < words; ++w) to[w] = subtract_words(to[w], x[w], borrow);
}

FEWSHOT_EXT_HOST_DEVICE FEWSHOT_EXT_INLINE bool wide_is_negative(const Word* x, int64_t words) {
  return x[words - 1] >> 63;
}

FEWSHOT_EXT_HOST_DEVICE FEWSHOT_EXT_INLINE bool wide_is_zero(const Word* x, int64_t words) {
  Word any = 0;
  for (int64_t w = 0; w < words; ++w) any |= x[w];
  return any == 0;
}

// Whether a < b, for numbers that are not negative.
FEWSHOT_EXT_HOST_DEVICE FEWSHOT_EXT_INLINE bool wide_is_less(const Word* a, const Word* b, int64_t words) {
  for (int64_t w = words - 1; w > 0; --w)
    if (a[w] != b[w]) return a[w] < b[w];
  return a[0] < b[0];
}

// to += x * factor * 2^shift, or -= where `negative`, for an x that is not negative. What leaves `words` is lost.
FEWSHOT_EXT_HOST_DEVICE inline void wide_add_product(Word* to, int64_t words, const Word* x, int64_t count, Word factor,
                                                     int64_t shift, bool negative) {
  const int64_t begin = shift / bits_of_word;
  const int bits = static_cast<int>(shift % bits_of_word);
  Word high = 0, below = 0;  // of the product; its word before this one
  bool carry = false;
  for (int64_t k = 0; begin + k < words; ++k) {
    if (k > count + 1 && !carry) return;
    const TwoWords product = (k < count ? TwoWords(x[k]) * factor : 0) + high;
    const Word low = static_cast<Word>(product);
    high = static_cast<Word>(product >> bits_of_word);
    const Word part = bits == 0 ? low : low << bits | below >> (bits_of_word - bits);
    below = low;
    Word& at = to[begin + k];
    at = negative ? subtract_words(at, part, carry) : add_words(at, part, carry);
  }
}

// to += x, or -= where `negate`, in units of 2^unit.
FEWSHOT_EXT_HOST_DEVICE inline void wide_add_double(Word* to, int64_t words, double x, int64_t unit,
                                                    bool negate = false) {
  const Binary binary(x);
  if (binary.mantissa == 0) return;
  const int64_t zeros = zeros_below(binary.mantissa);
  const Word one = 1;
  wide_add_product(to, words, &one, 1, binary.mantissa >> zeros, binary.exponent + zeros - unit,
                   binary.negative != negate);
}

// to = x * factor, for an x of either sign and as many words.
FEWSHOT_EXT_HOST_DEVICE inline void wide_multiply(Word* to, const Word* x, int64_t words, Word factor) {
  Word high = 0;
  for (int64_t w = 0; w < words; ++w) {
    const TwoWords product = TwoWords(x[w]) * factor + high;
    to[w] = static_cast<Word>(product);
    high = static_cast<Word>(product >> bits_of_word);
  }
}

// 2^exponent, of a normal double.
FEWSHOT_EXT_HOST_DEVICE FEWSHOT_EXT_INLINE double power_of_two(int64_t exponent) {
  const Word bits = static_cast<Word>(exponent + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof(power));
  return power;
}

// A number of any size: mantissa * 2^exponent, |mantissa| in [2^63, 2^64] or 0.
struct Scaled {
  double mantissa;
  int64_t exponent;

  FEWSHOT_EXT_HOST_DEVICE double times_power(int64_t power) const {
    power += exponent;
    if (power > -1000 && power < 900) return mantissa * power_of_two(power);
    return std::ldexp(mantissa, static_cast<int>(std::clamp<int64_t>(power, -4000, 4000)));
  }
  FEWSHOT_EXT_HOST_DEVICE double over(const Scaled& divisor, int64_t power) const {
    return Scaled{mantissa / divisor.mantissa, exponent - divisor.exponent}.times_power(power);
  }
};

FEWSHOT_EXT_HOST_DEVICE inline bool is_lower(const Scaled& a, const Scaled& b) {
  return a.times_power(-b.exponent) < b.mantissa;
}

// x, rounded to a double's digits as arithmetic would round it.
FEWSHOT_EXT_HOST_DEVICE inline Scaled wide_value(const Word* x, int64_t words) {
  const bool negative = wide_is_negative(x, words);
  const Word sign = negative ? ~Word(0) : 0;
  int64_t top = words - 1;
  while (top > 0 && (x[top] ^ sign) == 0) --top;
  // |x| is (x ^ sign) + negative; a carry from below reaches the top words where all below are zero.
  bool zero_below = true;
  for (int64_t w = 0; w < top - 1; ++w) zero_below &= x[w] == 0;
  const Word next = top > 0 ? x[top - 1] ^ sign : 0;
  TwoWords magnitude = TwoWords(x[top] ^ sign) << bits_of_word | next;
  int64_t exponent = (top - 1) * bits_of_word;
  if (negative && zero_below) {
    const TwoWords carry = top > 0 ? TwoWords(1) : TwoWords(1) << bits_of_word;
    magnitude += carry;
    if (magnitude < carry) return {-0x1p63, exponent + 65};
  }
  if (magnitude == 0) return {0, 0};
  const auto high = static_cast<Word>(magnitude >> bits_of_word);
  const int zeros = high ? zeros_above(high) : 64 + zeros_above(static_cast<Word>(magnitude));
  magnitude <<= zeros;
  Word digits = static_cast<Word>(magnitude >> bits_of_word);
  // Whatever is below counts for rounding alone.
  if (static_cast<Word>(magnitude) != 0 || !zero_below) digits |= 1;
  const auto mantissa = static_cast<double>(digits);
  return {negative ? -mantissa : mantissa, exponent + bits_of_word - zeros};
}

}  // namespace fewshot_ext::FEWSHOT_EXT_ISA
