// Element types on the device: conversions to and from fp32 with the bits of dtype.h (rounding to
// nearest even, subnormals, NaN payloads included), one at a time or 16 bytes at a time.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "inferlab/dtype.h"
#include "inferlab/noise.h"
#include "inferlab/status.h"

namespace inferlab::cuda {

// ---- what the hardware converts -----------------------------------------------------------------
// One instruction each, exact but for NaN, which loses its payload: the callers see to that.

__device__ __forceinline__ float f16_to_float_but_nan(uint16_t bits) {
#if defined(INFERLAB_CUDA_SHIM)
  return (bits & 0x7fffu) > 0x7c00u ? bits_to_float(0x7fffffffu) : to_float(f16{bits});
#else
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
#endif
}

__device__ __forceinline__ uint16_t float_to_f16_but_nan(float x) {
#if defined(INFERLAB_CUDA_SHIM)
  return x != x ? uint16_t{0x7fff} : from_float<f16>(x).bits;
#else
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#endif
}

__device__ __forceinline__ uint16_t float_to_bf16_but_nan(float x) {
#if defined(INFERLAB_CUDA_SHIM)
  return x != x ? uint16_t{0x7fff} : from_float<bf16>(x).bits;
#else
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#endif
}

// Two at once, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair_but_nan(float low, float high) {
#if defined(INFERLAB_CUDA_SHIM)
  if constexpr (std::is_same_v<T, f16>) {
    return float_to_f16_but_nan(low) | static_cast<uint32_t>(float_to_f16_but_nan(high)) << 16;
  } else {
    return float_to_bf16_but_nan(low) | static_cast<uint32_t>(float_to_bf16_but_nan(high)) << 16;
  }
#else
  uint32_t word;
  if constexpr (std::is_same_v<T, f16>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#endif
}

// ---- one element --------------------------------------------------------------------------------

__device__ __forceinline__ float load_float(float x) { return x; }
__device__ __forceinline__ float load_float(bf16 x) {
  return noise_from_bits(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float load_float(f16 x) {
  const float f = f16_to_float_but_nan(x.bits);
  if (f == f) return f;
  const uint32_t u = x.bits;
  return noise_from_bits((u & 0x8000u) << 16 | 0x7f800000u | (u & 0x3ffu) << 13);
}

template <typename T>
__device__ T store_float(float x);
template <>
__device__ __forceinline__ float store_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 store_float<bf16>(float x) {
  if (x == x) return bf16{float_to_bf16_but_nan(x)};
  return bf16{static_cast<uint16_t>(noise_to_bits(x) >> 16 | 0x40u)};
}
template <>
__device__ __forceinline__ f16 store_float<f16>(float x) {
  if (x == x) return f16{float_to_f16_but_nan(x)};
  return f16{static_cast<uint16_t>((noise_to_bits(x) >> 16 & 0x8000u) | 0x7e00u)};
}

// Rounds to T and back: what storing an intermediate result in T does.
template <typename T>
__device__ __forceinline__ float round_to(float x) {
  return load_float(store_float<T>(x));
}

// ---- 16 bytes: 4 elements of fp32, 8 of the others ----------------------------------------------
// NaN is looked for once per vector, off the path of numbers.

template <typename T>
constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
__device__ __forceinline__ T element_of(const uint32_t (&word)[4], int i) {
  return T{static_cast<uint16_t>(word[i / 2] >> (16 * (i % 2)))};
}

// out[i] = element i of the 16 bytes.
template <typename T>
__device__ __forceinline__ void unpack_floats(uint4 raw, float (&out)[kPerVector<T>]) {
  const uint32_t word[4] = {raw.x, raw.y, raw.z, raw.w};
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = noise_from_bits(word[i]);
  } else if constexpr (std::is_same_v<T, bf16>) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = load_float(element_of<bf16>(word, i));
  } else {
    bool nan = false;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      out[i] = f16_to_float_but_nan(element_of<f16>(word, i).bits);
      nan |= out[i] != out[i];
    }
    if (nan) {
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = load_float(element_of<f16>(word, i));
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack_floats(const float (&in)[kPerVector<T>]) {
  uint32_t word[4];
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) word[i] = noise_to_bits(in[i]);
  } else {
    bool nan = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[i] = pack_pair_but_nan<T>(in[2 * i], in[2 * i + 1]);
      nan |= in[2 * i] != in[2 * i] || in[2 * i + 1] != in[2 * i + 1];
    }
    if (nan) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        word[i] = static_cast<uint32_t>(store_float<T>(in[2 * i]).bits) |
                  static_cast<uint32_t>(store_float<T>(in[2 * i + 1]).bits) << 16;
      }
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// p is 16-byte aligned.
template <typename T>
__device__ __forceinline__ void load_floats(const T* p, float (&out)[kPerVector<T>]) {
  unpack_floats<T>(*reinterpret_cast<const uint4*>(p), out);
}
template <typename T>
__device__ __forceinline__ void store_floats(T* p, const float (&in)[kPerVector<T>]) {
  *reinterpret_cast<uint4*>(p) = pack_floats<T>(in);
}

// ---- for launchers ------------------------------------------------------------------------------

// Whether all of these pointers and byte counts are multiples of 16.
inline bool multiple_of_16(int64_t bytes) { return bytes % 16 == 0; }
inline bool multiple_of_16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
template <typename... Ts>
bool all_multiples_of_16(Ts... values) {
  return (multiple_of_16(values) && ...);
}

// f(T{}) for the element type.
template <typename F>
Status with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kF16:
      return f(f16{});
    case DType::kBF16:
      return f(bf16{});
  }
  return Status::kBadArgument;
}

}  // namespace inferlab::cuda
