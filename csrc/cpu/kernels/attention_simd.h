// What attention needs beyond simd.h: sums of many vectors at once, half vectors, tanh.
#pragma once

#include "inferlab/page_format.h"
#include "simd.h"

namespace inferlab::cpu::INFERLAB_ISA {

// Sums kLanes vectors: lane i of the result is the sum of a[i]'s lanes. Every sum is the same tree
// (lanes are halved kLanes / 2, ..., 2, 1 apart), so it does not depend on i.
#if defined(INFERLAB_ISA_AVX512)

inline __m512 add_halves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
}
inline __m512 add_quarters(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
inline __m512 add_pairs(__m512 a, __m512 b) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
inline __m512 add_singles(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
}
inline vf vsum_each(const vf* a) {
  // The network returns its inputs' sums with index bits (b0, b1) and (b2, b3) swapped.
  constexpr int in[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
  __m512 t[8], u[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) t[i] = add_halves(a[in[i]].v, a[in[i + 8]].v);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) u[i] = add_quarters(t[i], t[i + 4]);
  return {add_singles(add_pairs(u[0], u[2]), add_pairs(u[1], u[3]))};
}

#elif defined(INFERLAB_ISA_AVX2)

inline __m256 add_pairs(__m256 a, __m256 b) {
  const __m256d x = _mm256_castps_pd(a), y = _mm256_castps_pd(b);
  return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)),
                       _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
}
inline vf vsum_each(const vf* a) {
  constexpr int in[8] = {0, 2, 1, 3, 4, 6, 5, 7};  // index bits (b0, b1) come out swapped
  __m256 t[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 x = a[in[i]].v, y = a[in[i + 4]].v;
    t[i] = _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
  }
  const __m256 x = add_pairs(t[0], t[2]), y = add_pairs(t[1], t[3]);
  return {_mm256_add_ps(_mm256_shuffle_ps(x, y, 0x88), _mm256_shuffle_ps(x, y, 0xDD))};
}

#else

inline vf vsum_each(const vf* a) {
  vf r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = vreduce_add(a[i]);
  return r;
}

#endif

// Numbers of a page of 8 bits. In the high half of 16 bits and one place down, its sign apart, e4m3
// is f16, 2^8 too small; all bits set are NaN.
#if defined(INFERLAB_ISA_AVX512) || defined(INFERLAB_ISA_AVX2)
inline __m128i load_8_bytes(const void* p) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(p));
}
inline __m128i load_16_bytes(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
#endif
#if defined(INFERLAB_ISA_AVX512)
inline vf from_int8(__m128i x) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x))}; }
inline vf from_e4m3(__m128i x) {
  const __m256i w = _mm256_slli_epi16(_mm256_cvtepu8_epi16(x), 8);
  const __m256i half = _mm256_and_si256(_mm256_srai_epi16(w, 1), _mm256_set1_epi16(-0x4001));
  const __m256i rest = _mm256_and_si256(w, _mm256_set1_epi16(0x7fff));
  const __m256i nan = _mm256_cmpeq_epi16(rest, _mm256_set1_epi16(0x7f00));
  return {_mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(half, nan)), _mm512_set1_ps(0x1p8f))};
}
inline vf vload(const int8_t* p) { return from_int8(load_16_bytes(p)); }
inline vf vload(const e4m3* p) { return from_e4m3(load_16_bytes(p)); }
inline vf vload_half(const int8_t* p) { return from_int8(load_8_bytes(p)); }
inline vf vload_half(const e4m3* p) { return from_e4m3(load_8_bytes(p)); }
#elif defined(INFERLAB_ISA_AVX2)
inline vf vload(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_8_bytes(p)))};
}
inline vf vload(const e4m3* p) {
  const __m128i w = _mm_unpacklo_epi8(_mm_setzero_si128(), load_8_bytes(p));
  const __m128i half = _mm_and_si128(_mm_srai_epi16(w, 1), _mm_set1_epi16(-0x4001));
  const __m128i rest = _mm_and_si128(w, _mm_set1_epi16(0x7fff));
  const __m128i nan = _mm_cmpeq_epi16(rest, _mm_set1_epi16(0x7f00));
  return {_mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(half, nan)), _mm256_set1_ps(0x1p8f))};
}
#else
inline vf vload(const int8_t* p) {
  vf r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<float>(p[i]);
  return r;
}
inline vf vload(const e4m3* p) {
  vf r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = to_float(p[i]);
  return r;
}
#endif

// Loads the 8 elements that are left of a row when D is a multiple of 8 but not of kLanes.
#if defined(INFERLAB_ISA_AVX512)
inline vf vload_half(const float* p) { return {_mm512_maskz_loadu_ps(0x00ff, p)}; }
inline vf vload_half(const bf16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_zextsi128_si256(h)), 16))};
}
inline vf vload_half(const f16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtph_ps(_mm256_zextsi128_si256(h))};
}
#endif

#if defined(INFERLAB_ISA_AVX512)
inline vf vdiv(vf a, vf b) { return {_mm512_div_ps(a.v, b.v)}; }
inline vf vabs(vf a) { return {_mm512_abs_ps(a.v)}; }
// a < limit ? x : y, lane by lane
inline vf vselect_lt(vf a, vf limit, vf x, vf y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, limit.v, _CMP_LT_OQ), y.v, x.v)};
}
inline vf vcopysign(vf magnitude, vf sign) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  return {_mm512_castsi512_ps(_mm512_or_si512(
      _mm512_castps_si512(magnitude.v), _mm512_and_si512(_mm512_castps_si512(sign.v), mask)))};
}
#elif defined(INFERLAB_ISA_AVX2)
inline vf vdiv(vf a, vf b) { return {_mm256_div_ps(a.v, b.v)}; }
inline vf vabs(vf a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline vf vselect_lt(vf a, vf limit, vf x, vf y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, limit.v, _CMP_LT_OQ))};
}
inline vf vcopysign(vf magnitude, vf sign) {
  return {_mm256_or_ps(magnitude.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}
#else
inline vf vdiv(vf a, vf b) {
  for (int i = 0; i < kLanes; ++i) a.v[i] /= b.v[i];
  return a;
}
inline vf vabs(vf a) {
  for (int i = 0; i < kLanes; ++i) a.v[i] = std::fabs(a.v[i]);
  return a;
}
inline vf vselect_lt(vf a, vf limit, vf x, vf y) {
  for (int i = 0; i < kLanes; ++i) x.v[i] = a.v[i] < limit.v[i] ? x.v[i] : y.v[i];
  return x;
}
inline vf vcopysign(vf magnitude, vf sign) {
  for (int i = 0; i < kLanes; ++i) magnitude.v[i] = std::copysign(magnitude.v[i], sign.v[i]);
  return magnitude;
}
#endif

// tanh of finite x: an odd polynomial near 0 (Cephes tanhf), 1 - 2 / (e^2x + 1) elsewhere.
inline vf vtanh(vf x) {
  const vf a = vabs(x);
  const vf s = x * x;
  vf p = vset(-5.70498872745e-3f);
  p = vfma(p, s, vset(2.06390887954e-2f));
  p = vfma(p, s, vset(-5.37397155531e-2f));
  p = vfma(p, s, vset(1.33314422036e-1f));
  p = vfma(p, s, vset(-3.33332819422e-1f));
  const vf near = vfma(p * s, x, x);
  const vf far = vset(1.0f) - vdiv(vset(2.0f), vexp(a + a) + vset(1.0f));
  return vselect_lt(a, vset(0.625f), near, vcopysign(far, x));
}

}  // namespace inferlab::cpu::INFERLAB_ISA
