// Reading passes over a row: block maxima, rank keys of the large elements, the float32 copy. Bytes
// moved: the row once (scan, count, widen); only the blocks that qualify (collect).
#include "row_kernels.h"
#include "simd.h"

namespace inferlab::cpu::INFERLAB_ISA {
namespace {

// Integers order as floats do once the magnitude bits of negative ones are flipped, so 16-bit
// logits are compared 16 or 32 at a time without widening. A NaN's magnitude is above infinity's.
#if defined(INFERLAB_ISA_AVX512)
using vi = __m512i;
inline vi iload(const void* p) { return _mm512_loadu_si512(p); }
inline vi iset16(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
inline vi iset32(int x) { return _mm512_set1_epi32(x); }
inline vi iand(vi a, vi b) { return _mm512_and_si512(a, b); }
inline vi ixor(vi a, vi b) { return _mm512_xor_si512(a, b); }
inline vi ordered16(vi a) {
  return _mm512_ternarylogic_epi32(a, _mm512_srai_epi16(a, 15), iset16(0x7fff), 0x78);
}
inline vi imax16(vi a, vi b) { return _mm512_max_epi16(a, b); }
inline vi imaxu16(vi a, vi b) { return _mm512_max_epu16(a, b); }
inline vi imaxu32(vi a, vi b) { return _mm512_max_epu32(a, b); }
inline vi imax32(vi a, vi b) { return _mm512_max_epi32(a, b); }
inline __m256i ifold16(vi a) {
  return _mm256_max_epi16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
}
inline __m256i ifold32(vi a) {
  return _mm256_max_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
}
#elif defined(INFERLAB_ISA_AVX2)
using vi = __m256i;
inline vi iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline vi iset16(int x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
inline vi iset32(int x) { return _mm256_set1_epi32(x); }
inline vi iand(vi a, vi b) { return _mm256_and_si256(a, b); }
inline vi ixor(vi a, vi b) { return _mm256_xor_si256(a, b); }
inline vi ordered16(vi a) {
  return _mm256_xor_si256(a, iand(_mm256_srai_epi16(a, 15), iset16(0x7fff)));
}
inline vi imax16(vi a, vi b) { return _mm256_max_epi16(a, b); }
inline vi imaxu16(vi a, vi b) { return _mm256_max_epu16(a, b); }
inline vi imaxu32(vi a, vi b) { return _mm256_max_epu32(a, b); }
inline vi imax32(vi a, vi b) { return _mm256_max_epi32(a, b); }
inline __m256i ifold16(vi a) { return a; }
inline __m256i ifold32(vi a) { return a; }
#endif

#if defined(INFERLAB_ISA_AVX512) || defined(INFERLAB_ISA_AVX2)
inline int16_t reduce16(vi a) {
  const __m256i h = ifold16(a);
  const __m128i q = _mm_max_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  // minpos finds the smallest unsigned word: flipped, that is the largest signed one.
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(q, _mm_set1_epi16(0x7fff)));
  return static_cast<int16_t>(_mm_extract_epi16(least, 0) ^ 0x7fff);
}

inline int32_t reduce32(vi a) {
  const __m256i h = ifold32(a);
  __m128i q = _mm_max_epi32(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
  q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  q = _mm_max_epi32(q, _mm_shuffle_epi32(q, 0xb1));
  return _mm_cvtsi128_si32(q);
}

// Largest element of one block; magnitudes accumulates the largest |bits|.
template <typename T>
float block_largest(const T* x, int block, vi& magnitudes) {  // bf16, f16
  constexpr int kStep = static_cast<int>(sizeof(vi) / 2);
  vi best = iset16(-32768);
  for (int i = 0; i < block; i += kStep) {
    const vi v = iload(x + i);
    best = imax16(best, ordered16(v));
    magnitudes = imax16(magnitudes, iand(v, iset16(0x7fff)));
  }
  const int16_t key = reduce16(best);
  return to_float(T{static_cast<uint16_t>(key < 0 ? key ^ 0x7fff : key)});
}

float block_largest(const float* x, int block, vi& magnitudes) {
  vf m0 = vset(-kInf), m1 = m0;
  for (int i = 0; i < block; i += 2 * kLanes) {
    m0 = vmax(m0, vload(x + i));
    m1 = vmax(m1, vload(x + i + kLanes));
    const vi a = iand(iload(x + i), iset32(0x7fffffff));
    const vi b = iand(iload(x + i + kLanes), iset32(0x7fffffff));
    magnitudes = imax32(magnitudes, imax32(a, b));
  }
  return vreduce_max(vmax(m0, m1));
}

// The largest element as bits, while it is not negative: signed integers order as such floats do.
// Among unsigned ones a negative NaN is the largest. Two operations per vector.
inline vi largest_signed(vi a, vi b, const float*) { return imax32(a, b); }
inline vi largest_unsigned(vi a, vi b, const float*) { return imaxu32(a, b); }
inline int32_t reduce(vi a, const float*) { return reduce32(a); }
template <typename T>
vi largest_signed(vi a, vi b, const T*) {
  return imax16(a, b);
}
template <typename T>
vi largest_unsigned(vi a, vi b, const T*) {
  return imaxu16(a, b);
}
template <typename T>
int32_t reduce(vi a, const T*) {
  return reduce16(a);
}
inline vi flip_sign(vi a, const float*) { return ixor(a, iset32(INT32_MIN)); }
template <typename T>
vi flip_sign(vi a, const T*) {
  return ixor(a, iset16(INT16_MIN));
}
inline int32_t infinity_bits(const float*) { return 0x7f800000; }
inline int32_t infinity_bits(const bf16*) { return 0x7f80; }
inline int32_t infinity_bits(const f16*) { return 0x7c00; }
inline float float_of(int32_t bits, const float*) {
  return bits_to_float(static_cast<uint32_t>(bits));
}
template <typename T>
float float_of(int32_t bits, const T*) {
  return to_float(T{static_cast<uint16_t>(bits)});
}

// Largest element of x[0 .. size), size a multiple of kSpan; false: a NaN.
constexpr int64_t kSpan = 256;
template <typename T>
bool span_largest(const T* x, int64_t size, float* best) {
  constexpr int kStep = static_cast<int>(sizeof(vi) / sizeof(T));
  const vi least = flip_sign(iset32(0), x);  // the smallest signed integer in every lane
  vi top[4] = {least, least, least, least};
  vi bottom[4] = {iset32(0), iset32(0), iset32(0), iset32(0)};
  for (int64_t i = 0; i < size; i += 4 * kStep) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vi v = iload(x + i + j * kStep);
      top[j] = largest_signed(top[j], v, x);
      bottom[j] = largest_unsigned(bottom[j], v, x);
    }
  }
  const auto join = [&](const vi* a, auto larger) {
    return larger(larger(a[0], a[1], x), larger(a[2], a[3], x), x);
  };
  const int32_t high =
      reduce(join(top, [](vi a, vi b, auto p) { return largest_signed(a, b, p); }), x);
  const vi low = join(bottom, [](vi a, vi b, auto p) { return largest_unsigned(a, b, p); });
  // As signed integers once the sign bit is flipped back; -inf is then infinity's bits.
  if (high > infinity_bits(x) || reduce(flip_sign(low, x), x) > infinity_bits(x)) return false;
  if (high >= 0) {
    *best = float_of(high, x);
    return true;
  }
  vi magnitudes = iset32(0);
  *best = -kInf;
  for (int64_t i = 0; i < size; i += kSpan) {
    const float block = block_largest(x + i, kSpan, magnitudes);
    *best = block > *best ? block : *best;
  }
  return true;
}

inline bool any_nan(const vi& magnitudes, const float*) {
  return reduce32(magnitudes) > 0x7f800000;
}
inline bool any_nan(const vi& magnitudes, const bf16*) { return reduce16(magnitudes) > 0x7f80; }
inline bool any_nan(const vi& magnitudes, const f16*) { return reduce16(magnitudes) > 0x7c00; }
inline vi no_magnitudes() { return iset32(0); }

#else

using vi = uint32_t;  // 1: a NaN was seen

template <typename T>
float block_largest(const T* x, int block, vi& nan) {
  vf best = vset(-kInf);
  for (int i = 0; i < block; i += kLanes) {
    const vf a = vload(x + i);
    nan |= visnan(a);
    best = vmax(best, a);
  }
  return vreduce_max(best);
}
template <typename T>
bool any_nan(const vi& nan, const T*) {
  return nan != 0;
}
inline vi no_magnitudes() { return 0; }

constexpr int64_t kSpan = 4 * kLanes;
template <typename T>
bool span_largest(const T* x, int64_t size, float* best) {
  vi nan = 0;
  *best = block_largest(x, static_cast<int>(size), nan);
  return nan == 0;
}

#endif

template <typename T>
bool scan(const T* x, const Row& row, int64_t begin, int64_t end) {
  vi magnitudes = no_magnitudes();
  bool tail_nan = false;
  for (int64_t b = begin / row.block; b * row.block < end; ++b) {
    const int64_t first = b * row.block;
    if (first + row.block <= end) {
      row.block_max[b] = block_largest(x + first, row.block, magnitudes);
      continue;
    }
    float best = -kInf;
    for (int64_t i = first; i < end; ++i) {
      const float l = to_float(x[i]);
      tail_nan |= l != l;
      best = l > best ? l : best;
    }
    row.block_max[b] = best;
  }
  return !tail_nan && !any_nan(magnitudes, x);
}

template <typename T>
bool largest(const T* x, int64_t begin, int64_t end, float* best, int32_t* token) {
  *best = -kInf;
  *token = -1;
  for (int64_t i = begin; i < end;) {
    const int64_t left = end - i < kPiece ? end - i : kPiece;
    const int64_t size = left < kSpan ? left : left - left % kSpan;
    float here = -kInf;
    bool valid = true;
    if (size < kSpan) {
      for (int64_t j = i; j < i + size; ++j) {
        const float l = to_float(x[j]);
        valid &= l == l;
        here = l > here ? l : here;
      }
    } else {
      valid = span_largest(x + i, size, &here);
    }
    if (!valid) return false;
    if (here > *best) {
      int64_t j = i;
      const vf bound = vset(here);
      while (j + kLanes <= i + size && vge(vload(x + j), bound) == 0) j += kLanes;
      while (to_float(x[j]) != here) ++j;
      *best = here;
      *token = static_cast<int32_t>(j);
    }
    i += size;
  }
  return true;
}

template <typename T>
int64_t collect(const T* x, const Row& row, float least, uint64_t* keys) {
  int64_t count = 0;
  const vf bound = vset(least);
  for (int64_t b = 0; b * row.block < row.size; ++b) {
    if (!(row.block_max[b] >= least)) continue;
    const int64_t first = b * row.block;
    const int64_t last = first + row.block < row.size ? first + row.block : row.size;
    int64_t i = first;
    for (; i + kLanes <= last; i += kLanes) {
      for (uint32_t m = vge(vload(x + i), bound); m != 0; m &= m - 1) {
        const int64_t t = i + __builtin_ctz(m);
        keys[count++] = rank_key(to_float(x[t]), static_cast<uint32_t>(t));
      }
    }
    for (; i < last; ++i) {
      const float l = to_float(x[i]);
      if (l >= least) keys[count++] = rank_key(l, static_cast<uint32_t>(i));
    }
  }
  return count;
}

template <typename T>
int64_t count_ge(const T* x, const Row& row, float least) {
  int64_t count = 0, i = 0;
  const vf bound = vset(least);
  for (; i + kLanes <= row.size; i += kLanes) {
    count += __builtin_popcount(vge(vload(x + i), bound));
  }
  for (; i < row.size; ++i) count += to_float(x[i]) >= least ? 1 : 0;
  return count;
}

template <typename T>
void copy(const T* x, int64_t begin, int64_t end, float* out) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) vstore(out + i, vload(x + i));
  for (; i < end; ++i) out[i] = to_float(x[i]);
}

}  // namespace

bool scan_blocks(const Row& row, int64_t begin, int64_t end) {
  return INFERLAB_BY_DTYPE(row, scan, row, begin, end);
}

bool find_largest(const Row& row, int64_t begin, int64_t end, float* best, int32_t* token) {
  return INFERLAB_BY_DTYPE(row, largest, begin, end, best, token);
}

int64_t collect_keys(const Row& row, float least, uint64_t* keys) {
  return INFERLAB_BY_DTYPE(row, collect, row, least, keys);
}

int64_t count_at_least(const Row& row, float least) {
  return INFERLAB_BY_DTYPE(row, count_ge, row, least);
}

void widen(const Row& row, int64_t begin, int64_t end, float* out) {
  INFERLAB_BY_DTYPE(row, copy, begin, end, out);
}

}  // namespace inferlab::cpu::INFERLAB_ISA
