// How a K/V page holds one head of one token: as the numbers that were computed, or in 8 bits each.
#pragma once

#include "inferlab/dtype.h"

namespace inferlab {

enum class PageFormat : int {
  kSame = 0,  // D elements of the op's type
  kInt8 = 1,  // D int8, and behind them the fp32 scale that they are multiplied with
  kE4M3 = 2,  // D e4m3
};

#if !defined(__METAL_VERSION__)

// Sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f is NaN, and nothing is infinite.
// Micikevicius et al., "FP8 formats for deep learning", 2022.
struct e4m3 {
  uint8_t bits;
};

inline namespace INFERLAB_INLINE_NAMESPACE {

constexpr int64_t kPageScaleBytes = 4;
constexpr int64_t kMaxHeadDim = 256;  // of attention, and of what pages hold in 8 bits

inline int64_t page_head_bytes(PageFormat format, int64_t dim, DType dtype) {
  if (format == PageFormat::kSame) return dim * dtype_size(dtype);
  return format == PageFormat::kInt8 ? dim + kPageScaleBytes : dim;
}

inline float to_float(e4m3 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80u) << 24;
  const uint32_t rest = x.bits & 0x7fu;
  if (rest == 0x7fu) return bits_to_float(sign | 0x7fc00000u);
  if (rest < 8) return bits_to_float(sign | float_to_bits(static_cast<float>(rest) * 0x1p-9f));
  return bits_to_float(sign | ((rest << 20) + 0x3c000000u));
}

// Round to nearest even; what is too large becomes the largest, 448, what is not finite NaN.
template <>
inline e4m3 from_float<e4m3>(float x) {
  const uint32_t u = float_to_bits(x), mag = u & 0x7fffffffu;
  const auto sign = static_cast<uint8_t>((u >> 24) & 0x80u);
  const auto with_sign = [sign](uint32_t rest) {
    return e4m3{static_cast<uint8_t>(sign | static_cast<uint8_t>(rest))};
  };
  if (mag >= 0x7f800000u) return with_sign(0x7f);
  if (mag >= 0x43e80000u) return with_sign(0x7e);  // >= 464 would round to more than 448
  if (mag < 0x3c800000u) {  // below 2^-6: subnormal; adding 2^14 rounds at 2^-9
    return with_sign(float_to_bits(bits_to_float(mag) + 0x1p14f) - 0x46800000u);
  }
  return with_sign((mag - 0x3c000000u + 0x7ffffu + ((mag >> 20) & 1u)) >> 20);
}

}  // namespace INFERLAB_INLINE_NAMESPACE
#endif

}  // namespace inferlab
