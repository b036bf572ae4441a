// The products of a range of outputs: bf16 by AMX where there is (linear_amx.h), else register
// blocks of up to kRows rows by 4 outputs, or half as many by 8: a vector of W is loaded once for
// all rows of the block. Elements are widened to fp32, x once and W as it is loaded, or multiplied
// in pairs as they are. Packed weights have products of their own (linear_packed.h). A block's
// shape changes no bit of a result.
#include "inferlab/linear.h"

#include <cmath>

#include "isa.h"
#include "linear_finish.h"
#include "linear_packed.h"
#include "simd.h"
#if defined(INFERLAB_ISA_AVX512)
#include "linear_amx.h"
#endif

namespace inferlab::cpu::INFERLAB_ISA {
namespace {

#if defined(INFERLAB_ISA_AVX512)
constexpr int kRows = 6;  // 24 accumulators of 32 registers
#elif defined(INFERLAB_ISA_AVX2)
constexpr int kRows = 3;  // 12 of 16
#else
constexpr int kRows = 4;  // 16 of 32 on arm64
#endif

// The sums of four vectors' lanes, in a tree of fixed shape: its bits depend on each vector alone.
inline void reduce_four(vf a, vf b, vf c, vf d, float* sums) {
#if defined(INFERLAB_ISA_AVX512)
  const __m512 ab =
      _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44), _mm512_shuffle_f32x4(a.v, b.v, 0xEE));
  const __m512 cd =
      _mm512_add_ps(_mm512_shuffle_f32x4(c.v, d.v, 0x44), _mm512_shuffle_f32x4(c.v, d.v, 0xEE));
  // Four lanes are left of each, side by side.
  __m512 all =
      _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4E));
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xB1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(sums, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all)));
#elif defined(INFERLAB_ISA_AVX2)
  const __m256 ab = _mm256_hadd_ps(a.v, b.v);
  const __m256 cd = _mm256_hadd_ps(c.v, d.v);
  const __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  sums[0] = vreduce_add(a);
  sums[1] = vreduce_add(b);
  sums[2] = vreduce_add(c);
  sums[3] = vreduce_add(d);
#endif
}

// How vectors of x and W are multiplied: x in fp32, elements of W widened.
template <typename T>
struct Widened {
  using X = float;
  using W = T;
  using Vector = vf;
  static constexpr int64_t kStep = kLanes;
  template <typename E>
  static vf load(const E* p) {
    return vload(p);
  }
  static vf dot(vf x, vf w, vf sum) { return vfma(x, w, sum); }
};

#if defined(INFERLAB_ISA_AVX512)
// bf16 by pairs, half as many instructions as with fp32, and nothing to widen. Whole vectors read
// subnormal numbers as zero.
struct Bf16Pairs {
  using X = bf16;
  using W = bf16;
  using Vector = __m512i;
  static constexpr int64_t kStep = 32;
  static bool usable(const LinearParams& p) {
    return active_isa() == Isa::kAvx512Bf16 && p.dtype == DType::kBF16;
  }
  static __m512i load(const bf16* p) { return _mm512_loadu_si512(p); }
  static vf dot(__m512i x, __m512i w, vf sum) {
    // The instruction by its name: the rest of the file is for processors without it, too.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(x), "v"(w));
    return sum;
  }
};
#endif

// sums[m * stride + n] = x[m] . w[n]; N is 4 or 8, or 1 for what is left.
template <typename By, int M, int N>
inline void dot_block(const typename By::X* x, int64_t x_stride, const typename By::W* w,
                      int64_t in, float* sums, int64_t stride) {
  vf acc[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[m][n] = vset(0.0f);
  }
  int64_t k = 0;
  for (; k + By::kStep <= in; k += By::kStep) {
    typename By::Vector xs[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) xs[m] = By::load(x + m * x_stride + k);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const typename By::Vector wn = By::load(w + n * in + k);
      __builtin_prefetch(w + (n + N) * in + k);  // of the next block
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m][n] = By::dot(xs[m], wn, acc[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    float* out = sums + m * stride;
    if constexpr (N == 1) {
      float four[4];
      reduce_four(acc[m][0], acc[m][0], acc[m][0], acc[m][0], four);
      out[0] = four[0];
    } else {
#pragma GCC unroll 2
      for (int n = 0; n < N; n += 4) {
        reduce_four(acc[m][n], acc[m][n + 1], acc[m][n + 2], acc[m][n + 3], out + n);
      }
    }
    for (int n = 0; n < N && k < in; ++n) {
      for (int64_t j = k; j < in; ++j) {
        out[n] = std::fma(to_float(x[m * x_stride + j]), to_float(w[n * in + j]), out[n]);
      }
    }
  }
}

// The products of `rows` <= M rows, with as many accumulators as it takes.
template <typename By, int N, int M = kRows>
inline void some_rows(const typename By::X* x, int64_t x_stride, int64_t rows,
                      const typename By::W* w, int64_t in, float* sums, int64_t stride) {
  if (rows == M) {
    dot_block<By, M, N>(x, x_stride, w, in, sums, stride);
  } else if constexpr (M > 1) {
    some_rows<By, N, M - 1>(x, x_stride, rows, w, in, sums, stride);
  }
}

template <typename By, int N>
inline void all_rows(const typename By::X* x, int64_t x_stride, int64_t rows,
                     const typename By::W* w, int64_t in, float* sums, int64_t stride) {
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t count = rows - row < kRows ? rows - row : kRows;
    some_rows<By, N>(x + row * x_stride, x_stride, count, w, in, sums + row * stride, stride);
  }
}

// Rows of x in fp32.
template <typename T>
void widen(const LinearParams& p, float* wide) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    float* out = wide + row * p.in;
    int64_t i = 0;
    for (; i + kLanes <= p.in; i += kLanes) vstore(out + i, vload(x + i));
    for (; i < p.in; ++i) out[i] = to_float(x[i]);
  }
}

template <typename By>
void dot_outputs(const LinearParams& p, const typename By::X* x, int64_t x_stride, int64_t begin,
                 int64_t end) {
  using W = typename By::W;
  // A block's sums stay in the first-level cache until they are rounded and stored.
  constexpr int64_t kSpan = 64;
  constexpr int64_t kBlockRows = 48;
  float sums[kBlockRows * kSpan];
  for (int64_t from = begin; from < end; from += kSpan) {
    const int64_t to = from + kSpan < end ? from + kSpan : end;
    for (int64_t row = 0; row < p.rows; row += kBlockRows) {
      const int64_t rows = p.rows - row < kBlockRows ? p.rows - row : kBlockRows;
      const typename By::X* block = x + row * x_stride;
      const W* w = static_cast<const W*>(p.weight) + from * p.in;
      float* out = sums;
      int64_t n = from;
      const auto advance = [&](int64_t count) {
        n += count;
        w += count * p.in;
        out += count;
      };
      if (rows <= kRows / 2) {
        for (; n + 8 <= to; advance(8)) {
          some_rows<By, 8, kRows / 2>(block, x_stride, rows, w, p.in, out, kSpan);
        }
      }
      for (; n + 4 <= to; advance(4)) all_rows<By, 4>(block, x_stride, rows, w, p.in, out, kSpan);
      for (; n < to; advance(1)) all_rows<By, 1>(block, x_stride, rows, w, p.in, out, kSpan);
      for (int64_t r = 0; r < rows; ++r) finish_row<W>(p, row + r, from, to, sums + r * kSpan);
    }
  }
}

}  // namespace

int64_t linear_scratch_floats(const LinearParams& p) {
  if (p.bits > 0) return PackedRows::scratch_floats(p);
#if defined(INFERLAB_ISA_AVX512)
  if (LinearTiles::usable(p)) return LinearTiles::scratch_floats(p);
  if (Bf16Pairs::usable(p)) return 0;
#endif
  return p.dtype == DType::kF32 ? 0 : p.rows * p.in;
}

void linear_prepare(const LinearParams& p, float* scratch) {
  if (p.bits > 0) return PackedRows(p, scratch).round_rows(p);
#if defined(INFERLAB_ISA_AVX512)
  if (LinearTiles::usable(p)) return LinearTiles::pack(p, scratch);
  if (Bf16Pairs::usable(p)) return;
#endif
  if (p.dtype == DType::kF16) widen<f16>(p, scratch);
  if (p.dtype == DType::kBF16) widen<bf16>(p, scratch);
}

void linear_outputs(const LinearParams& p, const float* scratch, int64_t begin, int64_t end) {
  if (p.bits > 0) return packed_outputs(p, scratch, begin, end);
#if defined(INFERLAB_ISA_AVX512)
  if (LinearTiles::usable(p)) return LinearTiles(p, scratch).outputs(begin, end);
  if (Bf16Pairs::usable(p)) {
    return dot_outputs<Bf16Pairs>(p, static_cast<const bf16*>(p.x), p.x_stride, begin, end);
  }
#endif
  const bool in_place = p.dtype == DType::kF32;
  const float* x = in_place ? static_cast<const float*>(p.x) : scratch;
  with_dtype(p.dtype, [&](auto zero) {
    dot_outputs<Widened<decltype(zero)>>(p, x, in_place ? p.x_stride : p.in, begin, end);
  });
}

}  // namespace inferlab::cpu::INFERLAB_ISA
