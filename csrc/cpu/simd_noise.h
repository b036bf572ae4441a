// Philox over consecutive counters in SIMD lanes, and noise_log / noise_gumbel of noise.h on
// vectors: the same integers and the same fp32 operations in the same order, so the same bits.
// Include only from csrc/cpu/kernels/*.cpp.
#pragma once

#include "inferlab/noise.h"
#include "simd.h"

namespace inferlab::cpu::INFERLAB_ISA {

// 64-bit lanes whose low halves hold 32-bit words; what the high halves hold does not matter.
#if defined(INFERLAB_ISA_AVX512)

constexpr int kWordLanes = 8;
struct vq {
  __m512i v;
};
inline vq qset(uint32_t x) { return {_mm512_set1_epi64(static_cast<int64_t>(x))}; }
inline vq qiota(uint32_t first) {
  return {_mm512_add_epi64(qset(first).v, _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7))};
}
inline vq qmul(vq a, vq b) { return {_mm512_mul_epu32(a.v, b.v)}; }
inline vq qhigh(vq a) { return {_mm512_srli_epi64(a.v, 32)}; }
inline vq qxor(vq a, vq b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline vq qxor3(vq a, vq b, vq c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
inline vq qmin(vq a, vq b) { return {_mm512_min_epu32(a.v, b.v)}; }
// Bit i set where word i <= bound.
inline uint32_t qle(vq a, vq bound) {
  const __mmask16 m = _mm512_mask_cmple_epu32_mask(0x5555, a.v, bound.v);
  return _pext_u32(m, 0x5555);
}
inline bool qany_le(vq a, vq bound) {
  return _mm512_mask_cmple_epu32_mask(0x5555, a.v, bound.v) != 0;
}
inline void qstore(uint32_t* out, vq a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32(a.v));
}

#elif defined(INFERLAB_ISA_AVX2)

constexpr int kWordLanes = 4;
struct vq {
  __m256i v;
};
inline vq qset(uint32_t x) { return {_mm256_set1_epi64x(static_cast<int64_t>(x))}; }
inline vq qiota(uint32_t first) {
  return {_mm256_add_epi64(qset(first).v, _mm256_setr_epi64x(0, 1, 2, 3))};
}
inline vq qmul(vq a, vq b) { return {_mm256_mul_epu32(a.v, b.v)}; }
inline vq qhigh(vq a) { return {_mm256_srli_epi64(a.v, 32)}; }
inline vq qxor(vq a, vq b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline vq qxor3(vq a, vq b, vq c) { return qxor(qxor(a, b), c); }
inline vq qmin(vq a, vq b) { return {_mm256_min_epu32(a.v, b.v)}; }
inline uint32_t qle(vq a, vq bound) {
  const __m256i le = _mm256_cmpeq_epi32(_mm256_min_epu32(a.v, bound.v), a.v);
  const int m = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_slli_epi64(le, 32)));
  return static_cast<uint32_t>(m);
}
inline bool qany_le(vq a, vq bound) { return qle(a, bound) != 0; }
inline void qstore(uint32_t* out, vq a) {
  const __m256i packed =
      _mm256_permutevar8x32_epi32(a.v, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}

#else

constexpr int kWordLanes = 4;
struct vq {
  uint64_t v[4];
};
#define INFERLAB_LANES(expr)                 \
  vq r;                                      \
  for (int i = 0; i < 4; ++i) r.v[i] = expr; \
  return r
inline uint64_t low_word(uint64_t x) { return x & 0xffffffffu; }
inline vq qset(uint32_t x) { INFERLAB_LANES(x); }
inline vq qiota(uint32_t first) { INFERLAB_LANES(first + static_cast<uint32_t>(i)); }
inline vq qmul(vq a, vq b) { INFERLAB_LANES(low_word(a.v[i]) * low_word(b.v[i])); }
inline vq qhigh(vq a) { INFERLAB_LANES(a.v[i] >> 32); }
inline vq qxor(vq a, vq b) { INFERLAB_LANES(a.v[i] ^ b.v[i]); }
inline vq qxor3(vq a, vq b, vq c) { INFERLAB_LANES(a.v[i] ^ b.v[i] ^ c.v[i]); }
inline vq qmin(vq a, vq b) {
  INFERLAB_LANES(low_word(a.v[i]) < low_word(b.v[i]) ? low_word(a.v[i]) : low_word(b.v[i]));
}
#undef INFERLAB_LANES
inline uint32_t qle(vq a, vq bound) {
  uint32_t m = 0;
  for (int i = 0; i < 4; ++i) m |= low_word(a.v[i]) <= low_word(bound.v[i]) ? 1u << i : 0u;
  return m;
}
inline bool qany_le(vq a, vq bound) { return qle(a, bound) != 0; }
inline void qstore(uint32_t* out, vq a) {
  for (int i = 0; i < 4; ++i) out[i] = static_cast<uint32_t>(a.v[i]);
}

#endif

// Tokens whose words one call of PhiloxRow::words yields: word j of lane i is token 4 * i + j.
constexpr int kWordTokens = 4 * kWordLanes;

// Philox4x32-10 for one (seed, position, purpose). Only the token counter varies, so round 1 and
// half of rounds 2 and 3 are the same for all lanes and done here once.
class PhiloxRow {
 public:
  PhiloxRow(uint64_t seed, uint32_t position, uint32_t purpose) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    uint32_t key0[10], key1[10];
    for (int r = 0; r < 10; ++r) {
      key0[r] = k0;
      key1[r] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const uint64_t a0 = uint64_t{kM0} * position, a1 = uint64_t{kM1} * purpose;
    token_xor_ = qset(high(a1) ^ key0[0]);
    const uint32_t c1 = static_cast<uint32_t>(a1), c2 = high(a0) ^ key1[0];
    const uint32_t c3 = static_cast<uint32_t>(a0);
    const uint64_t b1 = uint64_t{kM1} * c2;
    const uint32_t d0 = high(b1) ^ c1 ^ key0[1], d1 = static_cast<uint32_t>(b1);
    second_xor_ = qset(c3 ^ key1[1]);
    const uint64_t e0 = uint64_t{kM0} * d0;
    third_xor0_ = qset(d1 ^ key0[2]);
    third_xor2_ = qset(high(e0) ^ key1[2]);
    third_c3_ = qset(static_cast<uint32_t>(e0));
    for (int r = 3; r < 10; ++r) {
      key0_[r - 3] = qset(key0[r]);
      key1_[r - 3] = qset(key1[r]);
    }
    m0_ = qset(kM0);
    m1_ = qset(kM1);
  }

  // Words of counters [first, first + kWordLanes).
  inline void words(uint32_t first, vq out[4]) const {
    const vq p = qmul(m0_, qxor(qiota(first), token_xor_));  // round 2
    const vq q = qmul(m1_, qxor(qhigh(p), second_xor_));     // round 3
    vq c0 = qxor(qhigh(q), third_xor0_), c1 = q;
    vq c2 = qxor(p, third_xor2_), c3 = third_c3_;
    for (int r = 0; r < 7; ++r) {
      const vq p0 = qmul(m0_, c0), p1 = qmul(m1_, c2);
      c0 = qxor3(qhigh(p1), c1, key0_[r]);
      c2 = qxor3(qhigh(p0), c3, key1_[r]);
      c1 = p1;
      c3 = p0;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
  }

 private:
  static constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;
  static uint32_t high(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

  vq token_xor_, second_xor_, third_xor0_, third_xor2_, third_c3_, m0_, m1_;
  vq key0_[7], key1_[7];
};

// noise_log splits its argument with integer shifts; everything else is fp32.
#if defined(INFERLAB_ISA_AVX512)
inline void split_log(vf x, vf& e, vf& m) {
  const __m512i half = _mm512_set1_epi32(0x3f3504f3);
  const __m512i shifted = _mm512_sub_epi32(_mm512_castps_si512(x.v), half);
  e.v = _mm512_cvtepi32_ps(_mm512_srai_epi32(shifted, 23));
  const __m512i mantissa = _mm512_and_si512(shifted, _mm512_set1_epi32(0x007fffff));
  m.v = _mm512_castsi512_ps(_mm512_add_epi32(mantissa, half));
}
inline vf words_to_float(const uint32_t* w) { return {_mm512_cvtepu32_ps(_mm512_loadu_si512(w))}; }
#elif defined(INFERLAB_ISA_AVX2)
inline void split_log(vf x, vf& e, vf& m) {
  const __m256i half = _mm256_set1_epi32(0x3f3504f3);
  const __m256i shifted = _mm256_sub_epi32(_mm256_castps_si256(x.v), half);
  e.v = _mm256_cvtepi32_ps(_mm256_srai_epi32(shifted, 23));
  const __m256i mantissa = _mm256_and_si256(shifted, _mm256_set1_epi32(0x007fffff));
  m.v = _mm256_castsi256_ps(_mm256_add_epi32(mantissa, half));
}
inline vf words_to_float(const uint32_t* w) {
  // high * 2^16 is exact, so the one rounding is that of the addition.
  const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(u, 16));
  const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(u, _mm256_set1_epi32(0xffff)));
  return {_mm256_add_ps(_mm256_mul_ps(high, _mm256_set1_ps(65536.0f)), low)};
}
#else
inline void split_log(vf x, vf& e, vf& m) {
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t shifted = float_to_bits(x.v[i]) - 0x3f3504f3u;
    e.v[i] = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
    m.v[i] = bits_to_float((shifted & 0x007fffffu) + 0x3f3504f3u);
  }
}
inline vf words_to_float(const uint32_t* w) {
  vf r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<float>(w[i]);
  return r;
}
#endif

inline vf vnoise_log(vf x) {
  vf fe, m;
  split_log(x, fe, m);
  const vf f = m - vset(1.0f);
  vf p = vset(7.0376836292e-2f);
  p = vfma(p, f, vset(-1.1514610310e-1f));
  p = vfma(p, f, vset(1.1676998740e-1f));
  p = vfma(p, f, vset(-1.2420140846e-1f));
  p = vfma(p, f, vset(1.4249322787e-1f));
  p = vfma(p, f, vset(-1.6668057665e-1f));
  p = vfma(p, f, vset(2.0000714765e-1f));
  p = vfma(p, f, vset(-2.4999993993e-1f));
  p = vfma(p, f, vset(3.3333331174e-1f));
  const vf f2 = f * f;
  vf r = (p * f) * f2;
  r = vfma(fe, vset(-2.12194440e-4f), r);
  r = vfma(f2, vset(-0.5f), r);
  r = r + f;
  return vfma(fe, vset(0.693359375f), r);
}

inline vf vnoise_gumbel(const uint32_t* words) {
  vf u = vfma(words_to_float(words), vset(2.3283064365386963e-10f), vset(1.1641532182693481e-10f));
  u = vmin(u, vset(0.99999994f));
  const vf w = vset(1.0f) - u;
  const vf delta = (vset(1.0f) - w) - u;
  const vf exponential = vset(-0.0f) - (vnoise_log(w) + delta);
  return vset(-0.0f) - vnoise_log(exponential);
}

}  // namespace inferlab::cpu::INFERLAB_ISA
