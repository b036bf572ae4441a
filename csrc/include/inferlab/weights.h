// What filters compare: a token's softmax weight, its mass as an integer, its place in the ranking.
// Compiled by every backend; all arithmetic is integer or explicit fp32, so the bits are the same
// everywhere, and so are the tokens that filters keep.
#pragma once

#include <cmath>
#include <cstdint>

#include "inferlab/noise.h"

namespace inferlab {

// e^x as Cephes expf has it: n = round(x / ln 2), then a polynomial on r = x - n ln 2.
namespace exp_terms {
constexpr float kLowest = -104.0f, kHighest = 88.8f;  // 0 and inf from here on
constexpr float kLog2e = 1.44269504f;
constexpr float kMinusLn2High = -0.693359375f, kMinusLn2Low = 2.12194440e-4f;
constexpr float kP5 = 1.9875691500e-4f, kP4 = 1.3981999507e-3f, kP3 = 8.3334519073e-3f,
                kP2 = 4.1665795894e-2f, kP1 = 1.6666665459e-1f, kP0 = 5.0000001201e-1f;
}  // namespace exp_terms

constexpr double kMassUnits = 1099511627776.0;  // 2^40

inline namespace INFERLAB_INLINE_NAMESPACE {

INFERLAB_HD inline float round_to_even(float x) {
#if defined(__CUDA_ARCH__)
  return rintf(x);
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
  const int32_t whole = static_cast<int32_t>(n), half = whole >> 1;
  p = p * noise_from_bits(static_cast<uint32_t>(half + 127) << 23);
  return p * noise_from_bits(static_cast<uint32_t>(whole - half + 127) << 23);
}

// A weight in units of 2^-40: sums of masses are the same in any order. The largest weight, 1, has
// a mass of 2^40.
INFERLAB_HD inline uint64_t mass_of(float weight) {
  return static_cast<uint64_t>(
      static_cast<int64_t>(static_cast<double>(weight) * kMassUnits + 0.5));
}

// What top-p has to reach of a total.
INFERLAB_HD inline uint64_t mass_target(float top_p, uint64_t total) {
  const double least = ceil(static_cast<double>(top_p) * static_cast<double>(total));
  return least > 1.0 ? static_cast<uint64_t>(least) : 1u;
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
