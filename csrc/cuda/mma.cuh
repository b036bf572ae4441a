// Tensor core operations on one warp: C[16][8] += A[16][16] B[16][8] in fp32 from f16 or bf16, and
// the loads of their fragments from shared memory. With g = lane / 4, t = lane % 4, a lane holds
//   A  a[0..3]: rows g, g + 8, g, g + 8 at columns 2t, 2t, 2t + 8, 2t + 8, each with the next one
//   B  b0, b1:  rows 2t and 2t + 8 of column g, each with the next one
//   C  c[0..3]: rows g, g, g + 8, g + 8 at columns 2t, 2t + 1, 2t, 2t + 1
// All lanes must call. The plain C++ twins serve the CPU stand-in of tests/native/shim.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cp_async.cuh"
#include "inferlab/dtype.h"

namespace inferlab::cuda {

#if !defined(INFERLAB_CUDA_SHIM)

template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
// Of each, a lane gets row g, columns 2t and 2t + 1; transposed: rows 2t and 2t + 1, column g.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#else

template <typename T>
float half_of(uint64_t word, int i) {
  return to_float(T{static_cast<uint16_t>(word >> 16 * i)});
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint64_t a_of[2][32], b_of[32];
  simt::warp_exchange(0xffffffffu, a[0] | uint64_t{a[1]} << 32, a_of[0]);
  simt::warp_exchange(0xffffffffu, a[2] | uint64_t{a[3]} << 32, a_of[1]);
  simt::warp_exchange(0xffffffffu, b0 | uint64_t{b1} << 32, b_of);
  const unsigned g = simt::self->lane / 4, t = simt::self->lane % 4;
  for (int k = 0; k < 16; ++k) {
    const int lane = k % 8 / 2, high = k / 8, odd = k % 2;
    for (int i = 0; i < 4; ++i) {
      const float x = half_of<T>(a_of[high][4 * g + lane], 2 * (i / 2) + odd);
      const float y = half_of<T>(b_of[4 * (2 * t + i % 2) + lane], 2 * high + odd);
      c[i] += x * y;
    }
  }
}

inline void load_matrices(uint32_t (&m)[4], const void* row) {
  uint64_t rows[32];
  simt::warp_exchange(0xffffffffu, reinterpret_cast<uint64_t>(row), rows);
  const unsigned g = simt::self->lane / 4, t = simt::self->lane % 4;
  for (int i = 0; i < 4; ++i) m[i] = reinterpret_cast<const uint32_t*>(rows[8 * i + g])[t];
}

inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  uint64_t rows[32];
  simt::warp_exchange(0xffffffffu, reinterpret_cast<uint64_t>(row), rows);
  const unsigned g = simt::self->lane / 4, t = simt::self->lane % 4;
  for (int i = 0; i < 4; ++i) {
    const auto* low = reinterpret_cast<const uint16_t*>(rows[8 * i + 2 * t]);
    const auto* high = reinterpret_cast<const uint16_t*>(rows[8 * i + 2 * t + 1]);
    m[i] = low[g] | static_cast<uint32_t>(high[g]) << 16;
  }
}

inline float exp2_approx(float x) { return std::exp2(x); }

#endif

}  // namespace inferlab::cuda
