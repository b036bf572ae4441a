// A vector of fp32 lanes and little else: enough for the kernels, one definition per instruction
// set. Include only from csrc/cpu/kernels/*.cpp, which are compiled once per set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "inferlab/dtype.h"
#include "inferlab/weights.h"
#include "with_dtype.h"

#if defined(INFERLAB_ISA_AVX2) || defined(INFERLAB_ISA_AVX512)
#include <immintrin.h>
#endif

namespace inferlab::cpu::INFERLAB_ISA {

#if defined(INFERLAB_ISA_AVX512)

constexpr int kLanes = 16;

struct vf {
  __m512 v;
};
inline vf vset(float x) { return {_mm512_set1_ps(x)}; }
inline vf vload(const float* p) { return {_mm512_loadu_ps(p)}; }
inline vf vload(const bf16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline vf vload(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void vstore(float* p, vf a) { _mm512_storeu_ps(p, a.v); }
inline vf operator+(vf a, vf b) { return {_mm512_add_ps(a.v, b.v)}; }
inline vf operator-(vf a, vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline vf operator*(vf a, vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline vf vfma(vf a, vf b, vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline vf vmax(vf a, vf b) { return {_mm512_max_ps(a.v, b.v)}; }
inline vf vmin(vf a, vf b) { return {_mm512_min_ps(a.v, b.v)}; }
inline float vreduce_add(vf a) { return _mm512_reduce_add_ps(a.v); }
inline float vreduce_max(vf a) { return _mm512_reduce_max_ps(a.v); }
// Bit i set where a[i] > b[i]; false for NaN.
inline uint32_t vgt(vf a, vf b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline uint32_t vge(vf a, vf b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline uint32_t visnan(vf a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
inline vf vexp2_scale(vf p, vf n) { return {_mm512_scalef_ps(p.v, n.v)}; }
inline vf vround(vf a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

#elif defined(INFERLAB_ISA_AVX2)

constexpr int kLanes = 8;

struct vf {
  __m256 v;
};
inline vf vset(float x) { return {_mm256_set1_ps(x)}; }
inline vf vload(const float* p) { return {_mm256_loadu_ps(p)}; }
inline vf vload(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
inline vf vload(const f16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void vstore(float* p, vf a) { _mm256_storeu_ps(p, a.v); }
inline vf operator+(vf a, vf b) { return {_mm256_add_ps(a.v, b.v)}; }
inline vf operator-(vf a, vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline vf operator*(vf a, vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline vf vfma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline vf vmax(vf a, vf b) { return {_mm256_max_ps(a.v, b.v)}; }
inline vf vmin(vf a, vf b) { return {_mm256_min_ps(a.v, b.v)}; }
inline float vreduce_add(vf a) {
  const __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 y = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_shuffle_ps(y, y, 1)));
}
inline float vreduce_max(vf a) {
  const __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  const __m128 y = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}
inline uint32_t vgt(vf a, vf b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)));
}
inline uint32_t vge(vf a, vf b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
}
inline uint32_t visnan(vf a) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)));
}
inline vf vround(vf a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// p * 2^n for integral n in [-252, 252]: two steps, so that the result may be subnormal.
inline vf vexp2_scale(vf p, vf n) {
  const __m256i k = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(k, 1);
  const __m256i rest = _mm256_sub_epi32(k, half);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256 a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(p.v, a), b)};
}

#else  // generic: four lanes that the compiler vectorises (NEON on arm64)

constexpr int kLanes = 4;

struct vf {
  float v[4];
};
#define INFERLAB_LANES(expr)                 \
  vf r;                                      \
  for (int i = 0; i < 4; ++i) r.v[i] = expr; \
  return r
inline vf vset(float x) { INFERLAB_LANES(x); }
inline vf vload(const float* p) { INFERLAB_LANES(p[i]); }
inline vf vload(const bf16* p) { INFERLAB_LANES(to_float(p[i])); }
inline vf vload(const f16* p) { INFERLAB_LANES(to_float(p[i])); }
inline void vstore(float* p, vf a) {
  for (int i = 0; i < 4; ++i) p[i] = a.v[i];
}
inline vf operator+(vf a, vf b) { INFERLAB_LANES(a.v[i] + b.v[i]); }
inline vf operator-(vf a, vf b) { INFERLAB_LANES(a.v[i] - b.v[i]); }
inline vf operator*(vf a, vf b) { INFERLAB_LANES(a.v[i] * b.v[i]); }
inline vf vfma(vf a, vf b, vf c) { INFERLAB_LANES(std::fma(a.v[i], b.v[i], c.v[i])); }
inline vf vmax(vf a, vf b) { INFERLAB_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline vf vmin(vf a, vf b) { INFERLAB_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline vf vround(vf a) { INFERLAB_LANES(std::nearbyint(a.v[i])); }
inline vf vexp2_scale(vf p, vf n) { INFERLAB_LANES(std::ldexp(p.v[i], static_cast<int>(n.v[i]))); }
#undef INFERLAB_LANES
inline float vreduce_add(vf a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float vreduce_max(vf a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
  const float y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}
#define INFERLAB_MASK(cond)                               \
  uint32_t m = 0;                                         \
  for (int i = 0; i < 4; ++i) m |= (cond) ? 1u << i : 0u; \
  return m
inline uint32_t vgt(vf a, vf b) { INFERLAB_MASK(a.v[i] > b.v[i]); }
inline uint32_t vge(vf a, vf b) { INFERLAB_MASK(a.v[i] >= b.v[i]); }
inline uint32_t visnan(vf a) { INFERLAB_MASK(a.v[i] != a.v[i]); }
#undef INFERLAB_MASK

#endif

// weight_exp of weights.h on vectors: the same operations in the same order, so the same bits.
inline vf vexp(vf x) {
  x = vmin(vmax(x, vset(exp_terms::kLowest)), vset(exp_terms::kHighest));
  const vf n = vround(x * vset(exp_terms::kLog2e));
  vf r = vfma(n, vset(exp_terms::kMinusLn2High), x);
  r = vfma(n, vset(exp_terms::kMinusLn2Low), r);
  vf p = vset(exp_terms::kP5);
  p = vfma(p, r, vset(exp_terms::kP4));
  p = vfma(p, r, vset(exp_terms::kP3));
  p = vfma(p, r, vset(exp_terms::kP2));
  p = vfma(p, r, vset(exp_terms::kP1));
  p = vfma(p, r, vset(exp_terms::kP0));
  p = vfma(p, r * r, r);
  p = p + vset(1.0f);
  return vexp2_scale(p, n);
}

}  // namespace inferlab::cpu::INFERLAB_ISA
