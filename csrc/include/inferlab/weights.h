// What filters compare: a token's softmax weight, its mass as an integer, its place in the ranking.
// Compiled by every backend; all arithmetic is integer or explicit fp32, so the bits are the same
// everywhere, and so are the tokens that filters keep.
#pragma once

#include "inferlab/noise.h"

namespace inferlab {

// e^x as Cephes expf has it: n = round(x / ln 2), then a polynomial on r = x - n ln 2.
namespace exp_terms {
INFERLAB_CONSTANT float kLowest = -104.0f, kHighest = 88.8f;  // 0 and inf from here on
INFERLAB_CONSTANT float kLog2e = 1.44269504f;
INFERLAB_CONSTANT float kMinusLn2High = -0.693359375f, kMinusLn2Low = 2.12194440e-4f;
INFERLAB_CONSTANT float kP5 = 1.9875691500e-4f, kP4 = 1.3981999507e-3f, kP3 = 8.3334519073e-3f,
                        kP2 = 4.1665795894e-2f, kP1 = 1.6666665459e-1f, kP0 = 5.0000001201e-1f;
}  // namespace exp_terms

#if !defined(__METAL_VERSION__)
constexpr double kMassUnits = 1099511627776.0;  // 2^40
#endif

inline namespace INFERLAB_INLINE_NAMESPACE {

INFERLAB_HD inline float round_to_even(float x) {
#if defined(__CUDA_ARCH__)
  return rintf(x);
#elif defined(__METAL_VERSION__)
  return metal::rint(x);
#else
  return std::nearbyint(x);
#endif
}

// e^x, about 1 ulp in the normal range; 0 below -104, inf above 88.7. csrc/cpu/simd.h has the same
// on vectors.
INFERLAB_HD inline float weight_exp(float x) {
  x = x > exp_terms::kLowest ? x : exp_terms::kLowest;
  x = x < exp_terms::kHighest ? x : exp_terms::kHighest;
  const float n = round_to_even(x * exp_terms::kLog2e);
  float r = noise_fma(n, exp_terms::kMinusLn2High, x);
  r = noise_fma(n, exp_terms::kMinusLn2Low, r);
  float p = exp_terms::kP5;
  p = noise_fma(p, r, exp_terms::kP4);
  p = noise_fma(p, r, exp_terms::kP3);
  p = noise_fma(p, r, exp_terms::kP2);
  p = noise_fma(p, r, exp_terms::kP1);
  p = noise_fma(p, r, exp_terms::kP0);
  p = noise_fma(p, r * r, r) + 1.0f;
  // 2^n in two steps, so that the result may be subnormal.
  const int32_t whole = static_cast<int32_t>(n), first = whole >> 1;
  p = p * noise_from_bits(static_cast<uint32_t>(first + 127) << 23);
  return p * noise_from_bits(static_cast<uint32_t>(whole - first + 127) << 23);
}

// A weight in units of 2^-40: sums of masses are the same in any order. The largest weight, 1, has
// a mass of 2^40.
INFERLAB_HD inline uint64_t mass_of(float weight) {
#if defined(__METAL_VERSION__)  // the same rounding of mantissa * 2^shift without double
  const uint32_t bits = noise_to_bits(weight);
  const int32_t shift = static_cast<int32_t>(bits >> 23) - 150 + 40;
  const uint64_t mantissa = (bits & 0x007fffffu) | 0x00800000u;
  if (shift >= 0) return mantissa << shift;
  return shift < -25 ? 0 : ((mantissa >> (-shift - 1)) + 1) >> 1;
#else
  return static_cast<uint64_t>(
      static_cast<int64_t>(static_cast<double>(weight) * kMassUnits + 0.5));
#endif
}

// What top-p has to reach of a total: ceil(top_p * total), at least 1.
INFERLAB_HD inline uint64_t mass_target(float top_p, uint64_t total) {
#if defined(__METAL_VERSION__)  // exactly: mantissa * total has 88 bits, of which `shift` go
  const uint32_t bits = noise_to_bits(top_p);
  const uint32_t shift = 150 - (bits >> 23);  // at least 23, since top_p <= 1
  const uint64_t mantissa = (bits & 0x007fffffu) | 0x00800000u;
  const uint64_t low = (total & 0xffffffffu) * mantissa;
  const uint64_t high = (total >> 32) * mantissa + (low >> 32), last = low & 0xffffffffu;
  if (shift >= 96) return 1;
  uint64_t least, rest;
  if (shift >= 32) {
    least = high >> (shift - 32);
    rest = (high - (least << (shift - 32))) | last;
  } else {
    least = (high << (32 - shift)) | (last >> shift);
    rest = last & ((1u << shift) - 1u);
  }
  if (rest != 0) ++least;
  return least > 1 ? least : 1;
#else
  const double least = ceil(static_cast<double>(top_p) * static_cast<double>(total));
  return least > 1.0 ? static_cast<uint64_t>(least) : 1u;
#endif
}

// Integers order as floats do. -0 becomes +0: they tie.
INFERLAB_HD inline uint32_t ordered_bits(float x) {
  const uint32_t bits = noise_to_bits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
INFERLAB_HD inline float from_ordered(uint32_t ordered) {
  return noise_from_bits(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// The ranking "value descending, then token ascending" as one integer, larger is better; 0 is below
// every token's.
INFERLAB_HD inline uint64_t rank_key(float value, uint32_t token) {
  return static_cast<uint64_t>(ordered_bits(value)) << 32 | (0xffffffffu - token);
}
INFERLAB_HD inline float key_value(uint64_t key) {
  return from_ordered(static_cast<uint32_t>(key >> 32));
}
INFERLAB_HD inline int32_t key_token(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}

}  // namespace INFERLAB_INLINE_NAMESPACE
}  // namespace inferlab
