// What mma and ldmatrix do with the registers of a warp. Written from the tables of the PTX ISA alone, so that it and
// common/mma.cuh do not share their mistakes.
#include "simt/matrix.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "runtime/block.h"

namespace simt {

namespace {

constexpr uint32_t all_lanes = 0xffffffffu;
constexpr int rows = 16, columns = 8, most_inner = 16;

// Of one lane, on its stack. It waits while another lane does the work.
struct Operands {
  const uint32_t (&a)[4];
  const uint32_t (&b)[2];
  float (&c)[4];
};

struct Matrices {
  float a[rows][most_inner];
  float b[most_inner][columns];
};

float bfloat16(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

float float16(uint32_t bits) {
  const int exponent = bits >> 10 & 0x1f, mantissa = bits & 0x3ff;
  const float sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f;
  if (exponent == 0x1f) return sign * (mantissa == 0 ? INFINITY : NAN);
  return sign * (exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25));
}

// What the multiplier sees of a register: it takes whatever bits are there, and leaves out the last 13.
float tf32(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

// "Matrix Fragments for mma.m16n8k16 with floating point type", .f16 / .bf16.
template <float (*value)(uint32_t)>
struct Halves {
  static constexpr int inner = 16;

  static void collect(Matrices& matrices, unsigned lane, const Operands& operands) {
    const unsigned group_id = lane >> 2, thread_id_in_group = lane % 4;
    const auto element = [](const uint32_t* registers, int i) {
      return value(registers[i / 2] >> i % 2 * 16 & 0xffff);
    };
    for (int i = 0; i < 8; ++i) {
      const unsigned row = i < 2 || (4 <= i && i < 6) ? group_id : group_id + 8;
      const unsigned column = thread_id_in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      matrices.a[row][column] = element(operands.a, i);
    }
    for (int i = 0; i < 4; ++i) {
      const unsigned row = thread_id_in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
      matrices.b[row][group_id] = element(operands.b, i);
    }
  }
};

// "Matrix Fragments for mma.m16n8k8", .tf32.
struct Tf32 {
  static constexpr int inner = 8;

  static void collect(Matrices& matrices, unsigned lane, const Operands& operands) {
    const unsigned group_id = lane >> 2, thread_id_in_group = lane % 4;
    matrices.a[group_id][thread_id_in_group] = tf32(operands.a[0]);
    matrices.a[group_id + 8][thread_id_in_group] = tf32(operands.a[1]);
    matrices.a[group_id][thread_id_in_group + 4] = tf32(operands.a[2]);
    matrices.a[group_id + 8][thread_id_in_group + 4] = tf32(operands.a[3]);
    matrices.b[thread_id_in_group][group_id] = tf32(operands.b[0]);
    matrices.b[thread_id_in_group + 4][group_id] = tf32(operands.b[1]);
  }
};

template <size_t count>
float in_order(const std::array<float, count>& terms, const std::array<int, count>& order) {
  float sum = terms[order[0]];
  for (size_t i = 1; i < count; ++i) sum += terms[order[i]];
  return sum;
}

// As tensor cores have been found to add: all terms at once, cut off one bit below the last that float has for the
// largest of them, and the sum cut off to fit float.
template <size_t count>
float cut_off(const std::array<float, count>& terms) {
  float largest = 0, plain = 0;
  for (const float term : terms) {
    largest = std::max(largest, std::abs(term));
    plain += term;
  }
  if (largest == 0 || !std::isfinite(plain)) return plain;
  int exponent;
  std::frexp(largest, &exponent);
  double units = 0;
  for (const float term : terms) units += std::trunc(std::ldexp(static_cast<double>(term), 25 - exponent));
  const double sum = std::ldexp(units, exponent - 25);
  const float nearest = static_cast<float>(sum);
  return std::abs(nearest) > std::abs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

template <class Type>
void multiply(const Lanes& given, Launch& launch) {
  Matrices matrices;
  for (unsigned lane = 0; lane < warp_lanes; ++lane)
    Type::collect(matrices, lane, *std::bit_cast<const Operands*>(given[lane]));

  constexpr size_t count = Type::inner + 1;
  std::array<int, count> order;
  for (size_t i = 0; i < count; ++i) order[i] = static_cast<int>(i);
  if (launch.sums) {
    Random(*launch.sums).shuffle(order);
  } else {
    launch.random.shuffle(order);
  }
  for (unsigned lane = 0; lane < warp_lanes; ++lane) {
    const Operands& operands = *std::bit_cast<const Operands*>(given[lane]);
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = i < 2 ? lane >> 2 : (lane >> 2) + 8;
      const unsigned column = lane % 4 * 2 + (i & 1);
      std::array<float, count> terms;
      for (int k = 0; k < Type::inner; ++k) terms[k] = matrices.a[row][k] * matrices.b[k][column];
      terms.back() = operands.c[i];
      operands.c[i] = launch.cuts_off ? cut_off(terms) : in_order(terms, order);
    }
  }
}

template <class Type>
void mma(const char* intrinsic, const Operands& operands, Location where) {
  Block::running()->exchange(intrinsic, all_lanes, std::bit_cast<uint64_t>(&operands), where, false, multiply<Type>);
}

// The lane that points to a row answers for it, and the lanes that get its parts read them: what one lane writes and
// ldmatrix hands to another has to be behind a barrier.
const Lanes& rows_of_all_lanes(const char* intrinsic, const void* row, Location where) {
  Block& block = *Block::running();
  block.require_place(intrinsic, row, true, where);
  follow(SharedMemory::Kind::read, row, 16);
  return block.exchange(intrinsic, all_lanes, std::bit_cast<uint64_t>(row), where, false);
}

template <class Part>
Part read_part(uint64_t row, unsigned index) {
  const Part* part = std::bit_cast<const Part*>(row) + index;
  follow(SharedMemory::Kind::read, part, sizeof(Part));
  return *part;
}

}  // namespace

void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location where) {
  mma<Halves<bfloat16>>("mma_m16n8k16", {a, b, c}, where);
}

void mma_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location where) {
  mma<Halves<float16>>("mma_m16n8k16", {a, b, c}, where);
}

void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location where) {
  mma<Tf32>("mma_m16n8k8", {a, b, c}, where);
}

uint32_t round_to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7fffe000u;
  return std::isinf(x) ? bits : (bits + 0x1000u) & 0xffffe000u;
}

void ldmatrix_x4(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, const void* row, Location where) {
  const Lanes& rows = rows_of_all_lanes("ldmatrix_x4", row, where);
  const unsigned first = lane() / 4;
  unsigned matrix = 0;
  for (uint32_t* to : {&r0, &r1, &r2, &r3}) *to = read_part<uint32_t>(rows[8 * matrix++ + first], lane() % 4);
}

void ldmatrix_x4_trans(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, const void* row, Location where) {
  const Lanes& rows = rows_of_all_lanes("ldmatrix_x4_trans", row, where);
  const unsigned first = lane() % 4 * 2;
  unsigned matrix = 0;
  for (uint32_t* to : {&r0, &r1, &r2, &r3}) {
    const uint32_t low = read_part<uint16_t>(rows[8 * matrix + first], lane() / 4);
    const uint32_t high = read_part<uint16_t>(rows[8 * matrix + first + 1], lane() / 4);
    *to = low | high << 16;
    ++matrix;
  }
}

}  // namespace simt
