// Element types of logits, K/V pages and activations, and their conversions to and from fp32.
#pragma once

#include "inferlab/portable.h"

namespace inferlab {

enum class DType : int { kF32 = 0, kF16 = 1, kBF16 = 2 };

#if !defined(__METAL_VERSION__)
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline namespace INFERLAB_INLINE_NAMESPACE {

inline int dtype_size(DType t) { return t == DType::kF32 ? 4 : 2; }

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Exponents are rebased by a multiplication, which normalises subnormals on the way.
  const float magnitude = bits_to_float(rest << 13) * bits_to_float(0x77800000u);  // * 2^112
  return bits_to_float(sign | float_to_bits(magnitude));
}

// Round to nearest even, as torch does.
template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t u = float_to_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const uint32_t u = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (mag >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520
  if (mag < 0x38800000u) {  // below 2^-14: subnormal; adding 0.5 rounds at 2^-24
    const float r = bits_to_float(mag) + 0.5f;
    return f16{static_cast<uint16_t>(sign | (float_to_bits(r) - 0x3f000000u))};
  }
  const uint32_t odd = (mag >> 13) & 1u;
  return f16{static_cast<uint16_t>(sign | ((mag - 0x38000000u + 0xfffu + odd) >> 13))};
}

}  // namespace INFERLAB_INLINE_NAMESPACE
#endif
}  // namespace inferlab
