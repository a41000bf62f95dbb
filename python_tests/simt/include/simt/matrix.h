// Matrix instructions and asynchronous copies, as common/mma.cuh calls them. There is no CUDA name for either.
#pragma once

#include <cstdint>

#include "simt/runtime.h"

namespace simt {

// c += a b by all 32 lanes, their fragments laid out as the PTX ISA has it for mma.m16n8k16 and, of tf32, mma.m16n8k8.
// Products are exact. The seed decides how they and c are added: in an order that it draws, each sum rounded to
// nearest, or all at once and cut off.
void mma_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location where);
void mma_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location where);
void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location where);

uint32_t round_to_tf32(float x);

// By all 32 lanes, each with the address of a row of 16 bytes. They order no memory.
void ldmatrix_x4(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, const void* row, Location where);
void ldmatrix_x4_trans(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3, const void* row, Location where);

// 16 bytes of shared memory, the first of them from global memory and the others zero, at some moment before the thread
// has waited.
void cp_async(void* shared, const void* global, int bytes, Location where);
void cp_async_commit();
void cp_async_wait(int pending);

}  // namespace simt
