// Sums of products of unsigned with signed bytes, by fours: whole numbers, whatever computes them.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace inferlab::cpu::INFERLAB_ISA {

#if defined(INFERLAB_ISA_AVX512)

constexpr int kPackedRows = 12;  // of a block: 12 sums in fp32 and as many in whole numbers
constexpr int kPairRows = 6;     // of one with two tiles

struct vi {
  __m512i v;
};
struct vb {
  __m512i v;
};
inline vi vset(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline vi operator+(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline vf to_floats(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline vb load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline vb low_halves(vb a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
inline vb high_halves(vb a) {
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))};
}
inline bool has_fast_dot() {
  static const bool has = __builtin_cpu_supports("avx512vnni");
  return has;
}

// acc[i] + sum of w[4 i + j] x[j] over j < 4.
template <bool kFast>
inline vi dot4(vi acc, vb w, const int8_t* x) {
  if constexpr (kFast) {
    // The instruction by its name: the rest of the file is for processors without it, too.
    struct Four {
      int8_t of[4];
    };
    asm("vpdpbusd %2%{1to16%}, %1, %0"
        : "+v"(acc.v)
        : "v"(w.v), "m"(*reinterpret_cast<const Four*>(x)));
    return acc;
  } else {
    int32_t four;
    std::memcpy(&four, x, 4);
    const __m512i both = _mm512_set1_epi32(four);
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(both, 8), 8);
    const __m512i odd = _mm512_srai_epi16(both, 8);
    const __m512i w_even = _mm512_and_si512(w.v, _mm512_set1_epi16(0xff));
    const __m512i w_odd = _mm512_srli_epi16(w.v, 8);
    acc.v = _mm512_add_epi32(acc.v, _mm512_madd_epi16(w_even, even));
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(w_odd, odd))};
  }
}

#elif defined(INFERLAB_ISA_AVX2)

constexpr int kPackedRows = 2;
constexpr int kPairRows = 1;

struct vi {
  __m256i v;
};
struct vb {
  __m256i v;
};
inline vi vset(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline vi operator+(vi a, vi b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline vf to_floats(vi a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline vb load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline vb low_halves(vb a) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(15))}; }
inline vb high_halves(vb a) {
  return {_mm256_and_si256(_mm256_srli_epi16(a.v, 4), _mm256_set1_epi8(15))};
}
inline bool has_fast_dot() { return false; }

template <bool kFast>
inline vi dot4(vi acc, vb w, const int8_t* x) {
  // Pairs of products of bytes can exceed 16 bits, so bytes become words first.
  int32_t four;
  std::memcpy(&four, x, 4);
  const __m256i both = _mm256_set1_epi32(four);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8);
  const __m256i odd = _mm256_srai_epi16(both, 8);
  const __m256i w_even = _mm256_and_si256(w.v, _mm256_set1_epi16(0xff));
  const __m256i w_odd = _mm256_srli_epi16(w.v, 8);
  acc.v = _mm256_add_epi32(acc.v, _mm256_madd_epi16(w_even, even));
  return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(w_odd, odd))};
}

#else

constexpr int kPackedRows = 2;
constexpr int kPairRows = 1;

struct vi {
  int32_t v[4];
};
struct vb {
  uint8_t v[16];
};
inline vi vset(int32_t x) { return {{x, x, x, x}}; }
inline vi operator+(vi a, vi b) {
  for (int i = 0; i < 4; ++i) a.v[i] += b.v[i];
  return a;
}
inline vf to_floats(vi a) {
  vf r;
  for (int i = 0; i < 4; ++i) r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
inline vb load_bytes(const uint8_t* p) {
  vb r;
  std::memcpy(r.v, p, 16);
  return r;
}
inline vb low_halves(vb a) {
  for (uint8_t& byte : a.v) byte &= 15;
  return a;
}
inline vb high_halves(vb a) {
  for (uint8_t& byte : a.v) byte >>= 4;
  return a;
}
inline bool has_fast_dot() { return false; }

template <bool kFast>
inline vi dot4(vi acc, vb w, const int8_t* x) {
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) acc.v[i] += int32_t{w.v[4 * i + j]} * x[j];
  }
  return acc;
}

#endif

}  // namespace inferlab::cpu::INFERLAB_ISA
