// Sums of products of unsigned with signed bytes: whole numbers, whatever computes them.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

#if defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#endif

namespace inferlab::cpu::INFERLAB_ISA {

#if defined(INFERLAB_ISA_AVX512)

constexpr int kPackedRows = 12;  // of a block: 12 sums in fp32 and as many in whole numbers
constexpr int kPairRows = 6;     // of one with two tiles
constexpr int kZeroOfBytes = 128;

struct vi {
  __m512i v;
};
struct vb {
  __m512i v;
};
inline vi vset(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline vi operator+(vi a, vi b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline vi operator*(vi a, vi b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline vi widen_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline vf to_floats(vi a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline vb load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline vb whole_bytes(vb a) { return a; }
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

constexpr int kPackedRows = 4;
constexpr int kPairRows = 1;
constexpr int kZeroOfBytes = 128;

struct vi {
  __m256i v;
};
inline vi vset(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline vi operator*(vi a, vi b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline vi widen_bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline vf to_floats(vi a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline bool has_fast_dot() { return false; }

#elif defined(__ARM_NEON) && defined(__aarch64__)

constexpr int kPackedRows = 4;
constexpr int kPairRows = 1;
constexpr int kZeroOfBytes = 0;  // taken off them: products are of signed bytes

struct vi {
  int32x4_t v;
};
struct vb {
  uint8x16_t v;
};
inline vi vset(int32_t x) { return {vdupq_n_s32(x)}; }
inline vi operator+(vi a, vi b) { return {vaddq_s32(a.v, b.v)}; }
inline vi operator*(vi a, vi b) { return {vmulq_s32(a.v, b.v)}; }
inline vi widen_bytes(const uint8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  const uint16x8_t words = vmovl_u8(vcreate_u8(four));
  return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(words)))};
}
inline vf to_floats(vi a) {
  vf r;
  vst1q_f32(r.v, vcvtq_f32_s32(a.v));
  return r;
}
inline vb load_bytes(const uint8_t* p) { return {vld1q_u8(p)}; }
inline vb whole_bytes(vb a) { return {veorq_u8(a.v, vdupq_n_u8(128))}; }
inline vb low_halves(vb a) { return {vandq_u8(a.v, vdupq_n_u8(15))}; }
inline vb high_halves(vb a) { return {vshrq_n_u8(a.v, 4)}; }
inline bool has_fast_dot() {
#if defined(__ARM_FEATURE_DOTPROD)
  return true;
#elif defined(__linux__)
  static const bool has = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
  return has;
#else
  return false;
#endif
}

// acc[i] + sum of w[4 i + j] x[j] over j < 4.
template <bool kFast>
inline vi dot4(vi acc, vb bytes, const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  const int8x16_t w = vreinterpretq_s8_u8(bytes.v);
  const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
  if constexpr (kFast) {
#if defined(__ARM_FEATURE_DOTPROD)
    acc.v = vdotq_s32(acc.v, w, all);
#else
    // The instruction by its name: the rest of the file is for processors without it, too.
    asm(".arch armv8.2-a+dotprod\n\tsdot %0.4s, %1.16b, %2.16b" : "+w"(acc.v) : "w"(w), "w"(all));
#endif
    return acc;
  } else {
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(all)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(w, all));
    return {vaddq_s32(acc.v, vpaddq_s32(low, high))};
  }
}

#else

constexpr int kPackedRows = 2;
constexpr int kPairRows = 1;
constexpr int kZeroOfBytes = 128;

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
inline vi operator*(vi a, vi b) {
  for (int i = 0; i < 4; ++i) a.v[i] *= b.v[i];
  return a;
}
inline vi widen_bytes(const uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
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
inline vb whole_bytes(vb a) { return a; }
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

constexpr int kPackedAhead = 2048;  // bytes of W that are asked for before they are needed

#if defined(INFERLAB_ISA_AVX2)

// Of 8 bits, pairs of products exceed 16 bits, and bytes become words first: those of x once, in
// the order 0, 2, 1, 3, as the even and the odd bytes of W are taken together.
constexpr int packed_input_bytes(int bits) { return bits == 8 ? 2 : 1; }

// `count` inputs of a row, a multiple of 8, to where four and the next four are `stride` bytes
// apart.
inline void put_inputs(const int8_t* from, int64_t count, int bits, int8_t* to, int64_t stride) {
  const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  for (int64_t i = 0; i < count; i += 8, to += 2 * stride) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i));
    if (bits == 4) {
      _mm_storeu_si32(to, eight);
      _mm_storeu_si32(to + stride, _mm_srli_epi64(eight, 32));
      continue;
    }
    const __m128i words = _mm_shuffle_epi8(_mm_cvtepi8_epi16(eight), order);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), words);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + stride), _mm_srli_si128(words, 8));
  }
}

inline __m256i broadcast_four(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// sums[m][v][i] += sum of w[v][4 i + j] x[m][j] over the inputs of a group.
template <int kBits, bool kFast, int M, int V>
inline void add_group(vi (&sums)[M][V], const uint8_t* (&q)[V], const int8_t* x, int64_t group) {
  const auto load = [&](int v) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q[v]));
    __builtin_prefetch(q[v] + kPackedAhead);
    q[v] += 64;
    return w;
  };
  if constexpr (kBits == 8) {
    for (int64_t k = 0; k < group; k += 4, x += 8 * M) {
      __m256i even[V], odd[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const __m256i w = load(v);
        even[v] = _mm256_and_si256(w, _mm256_set1_epi16(0xff));
        odd[v] = _mm256_srli_epi16(w, 8);
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const __m256i first = broadcast_four(x + 8 * m), second = broadcast_four(x + 8 * m + 4);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          sums[m][v].v = _mm256_add_epi32(sums[m][v].v, _mm256_madd_epi16(even[v], first));
          sums[m][v].v = _mm256_add_epi32(sums[m][v].v, _mm256_madd_epi16(odd[v], second));
        }
      }
    }
  } else {
    // The pairs of 32 inputs add up to 16 * 15 * 127 at most, which 16 bits hold.
    for (int64_t k = 0; k < group; k += 32) {
      __m256i words[M][V];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) words[m][v] = _mm256_setzero_si256();
      }
      for (int i = 0; i < 4; ++i, x += 8 * M) {
        __m256i low[V], high[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const __m256i both = load(v);
          low[v] = _mm256_and_si256(both, _mm256_set1_epi8(15));
          high[v] = _mm256_and_si256(_mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const __m256i first = broadcast_four(x + 4 * m), second = broadcast_four(x + 4 * (M + m));
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            words[m][v] = _mm256_add_epi16(words[m][v], _mm256_maddubs_epi16(low[v], first));
            words[m][v] = _mm256_add_epi16(words[m][v], _mm256_maddubs_epi16(high[v], second));
          }
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const __m256i whole = _mm256_madd_epi16(words[m][v], _mm256_set1_epi16(1));
          sums[m][v].v = _mm256_add_epi32(sums[m][v].v, whole);
        }
      }
    }
  }
}

#else

constexpr int packed_input_bytes(int) { return 1; }

// `count` inputs of a row, a multiple of 8, to where four and the next four are `stride` bytes
// apart.
inline void put_inputs(const int8_t* from, int64_t count, int, int8_t* to, int64_t stride) {
  for (int64_t i = 0; i < count; i += 4, to += stride) std::memcpy(to, from + i, 4);
}

// sums[m][v][i] += sum of w[v][4 i + j] x[m][j] over the inputs of a group.
template <int kBits, bool kFast, int M, int V>
inline void add_group(vi (&sums)[M][V], const uint8_t* (&q)[V], const int8_t* x, int64_t group) {
  // A sum waits some cycles for the one before: few rows have two of them under way.
  constexpr bool kSplit = M <= 2;
  constexpr int kRest = kSplit ? M : 1;
  vi rest[kRest][V];
#pragma GCC unroll 2
  for (int m = 0; m < kRest; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) rest[m][v] = vset(0);
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < group; k += 8, x += 8 * M) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      vb first = load_bytes(q[v]), second;
      if constexpr (kBits == 8) {
        first = whole_bytes(first);
        second = whole_bytes(load_bytes(q[v] + 64));
      } else {
        second = high_halves(first);
        first = low_halves(first);
      }
      __builtin_prefetch(q[v] + kPackedAhead);
      if constexpr (kBits == 8) __builtin_prefetch(q[v] + kPackedAhead + 64);
      q[v] += 16 * kBits;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        sums[m][v] = dot4<kFast>(sums[m][v], first, x + 4 * m);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        vi& sum = kSplit ? rest[m % kRest][v] : sums[m][v];
        sum = dot4<kFast>(sum, second, x + 4 * (M + m));
      }
    }
  }
  if constexpr (kSplit) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[m][v] = sums[m][v] + rest[m][v];
    }
  }
}

#endif

}  // namespace inferlab::cpu::INFERLAB_ISA
