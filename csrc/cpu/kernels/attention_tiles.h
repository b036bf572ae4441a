// The two inner products of attention, register-blocked: scores of a few rows against a list of
// keys, and their weighted sum of values. Arithmetic per (row, key) and per (row, channel) is the
// same for every block shape, so shapes are chosen for speed alone.
#pragma once

#include <type_traits>

#include "attention_simd.h"
#include "attention_task.h"

namespace inferlab::cpu::INFERLAB_ISA {

constexpr int64_t kScoreStride = kChunk + kMaxLanes;

#if defined(INFERLAB_ISA_AVX512)
constexpr int kKeyRows = 4;    // rows per score tile; kLanes / rows keys
constexpr int kValueRows = 4;  // rows per value tile
constexpr int kValueVecs = 4;  // vectors of channels per value tile
#elif defined(INFERLAB_ISA_AVX2)
constexpr int kKeyRows = 2;
constexpr int kValueRows = 4;
constexpr int kValueVecs = 2;
#else
constexpr int kKeyRows = 2;
constexpr int kValueRows = 4;
constexpr int kValueVecs = 4;
#endif

template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);  // elements of a cache line

// The rows to ask the memory for while a tile is worked on: row i of the tile asks for
// base + offsets[i]. They come no nearer than the second-level cache: the first level's few miss
// buffers are left to the tile at hand.
template <typename T>
struct Ahead {
  const T* base = nullptr;  // null: nothing
  const int64_t* offsets = nullptr;

  // Elements [begin, end) of row i. Inlined by force: GCC drops calls of a function that does
  // nothing but prefetch, as it drops those of any other that has no effect.
  [[gnu::always_inline]] void ask(int64_t i, int64_t begin, int64_t end) const {
    for (int64_t d = begin; d < end; d += kLine<T>) __builtin_prefetch(base + offsets[i] + d, 0, 2);
  }
};

// Values of this many rows further on come from the second-level cache into the first. Sums that
// wait for a value hold up the asking behind them, and meanwhile the memory idles.
constexpr int64_t kNear = 16;

// Rows of keys or values of 8 or 16 bits in fp32, padded with zeros to `stride`.
template <typename P>
void convert_rows(const P* from, const int64_t* offsets, Range rows, int64_t dim, int64_t stride,
                  const Ahead<P>& ahead, float* to) {
  for (int64_t i = rows.begin; i < rows.end; ++i, to += stride) {
    const P* x = from + offsets[i];
    if (ahead.base != nullptr) ahead.ask(i, 0, dim);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) vstore(to + d, vload(x + d));
#if defined(INFERLAB_ISA_AVX512)
    if (d < dim) {
      vstore(to + d, vload_half(x + d));
      d += kLanes;
    }
#endif
    for (; d < stride; ++d) to[d] = 0.0f;
  }
}

// scores[r][i] = q[r] . k(offsets[i]) for i in [begin, end), rounded up to whole tiles: the scores
// row and the offset list (its last entry repeated) must have kMaxLanes entries of slack.
template <int R, bool kAsk, typename T>
void score_tiles(const float* q, int64_t q_stride, const T* k, const int64_t* offsets,
                 int64_t begin, int64_t end, int64_t dim, float* scores, const Ahead<T>& ahead) {
  constexpr int K = kLanes / R;
  for (int64_t i = begin; i < end; i += K) {
    const T* key[K];
#pragma GCC unroll 16
    for (int j = 0; j < K; ++j) key[j] = k + offsets[i + j];
    vf acc[R * K];
#pragma GCC unroll 16
    for (int j = 0; j < R * K; ++j) acc[j] = vset(0.0f);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      if (kAsk && d * sizeof(T) % 64 == 0) {
#pragma GCC unroll 16
        for (int j = 0; j < K; ++j) ahead.ask(i + j, d, d + 1);
      }
      vf row[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) row[r] = vload(q + r * q_stride + d);
#pragma GCC unroll 16
      for (int j = 0; j < K; ++j) {
        const vf x = vload(key[j] + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r * K + j] = vfma(row[r], x, acc[r * K + j]);
      }
    }
#if defined(INFERLAB_ISA_AVX512)
    if (d < dim) {
#pragma GCC unroll 16
      for (int j = 0; j < K; ++j) {
        const vf x = vload_half(key[j] + d);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          acc[r * K + j] = vfma(vload(q + r * q_stride + d), x, acc[r * K + j]);
        }
      }
    }
#endif
    const vf sums = vsum_each(acc);
    if (R == 1) {
      vstore(scores + i, sums);
    } else {
      float lanes[kLanes];
      vstore(lanes, sums);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) std::memcpy(scores + r * kScoreStride + i, lanes + r * K, 4 * K);
    }
  }
}

template <int R, typename T>
void score_rows(const float* q, int64_t q_stride, const T* k, const int64_t* offsets, int64_t begin,
                int64_t end, int64_t dim, float* scores, const Ahead<T>& ahead = {}) {
  if (ahead.base != nullptr) {
    score_tiles<R, true>(q, q_stride, k, offsets, begin, end, dim, scores, ahead);
  } else {
    score_tiles<R, false>(q, q_stride, k, offsets, begin, end, dim, scores, ahead);
  }
}

// acc[r][0 .. V vectors) += sum over i in [begin, end) of weights[r][i] * v(offsets[i]). Whoever
// asks is the first to pass over these channels; those beside them come next.
template <int R, int V, bool kHalf, bool kAsk, typename T>
void sum_values(float* acc, int64_t acc_stride, const float* weights, const T* v,
                const int64_t* offsets, int64_t begin, int64_t end, const Ahead<T>& ahead) {
  vf sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < V; ++c) sum[r][c] = vload(acc + r * acc_stride + c * kLanes);
  }
  for (int64_t i = begin; i < end; ++i) {
    const T* value = v + offsets[i];
    if (kAsk) {
      ahead.ask(i, 0, V * kLanes);
      const int64_t near = i + kNear;
      const T* soon = near < end ? v + offsets[near] : v + offsets[near - end + begin] + V * kLanes;
      for (int64_t d = 0; d < V * kLanes; d += kLine<T>) __builtin_prefetch(soon + d, 0, 3);
    }
    vf x[V];
#pragma GCC unroll 8
    for (int c = 0; c < V; ++c) {
#if defined(INFERLAB_ISA_AVX512)
      x[c] = kHalf ? vload_half(value + c * kLanes) : vload(value + c * kLanes);
#else
      x[c] = vload(value + c * kLanes);
#endif
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf w = vset(weights[r * kScoreStride + i]);
#pragma GCC unroll 8
      for (int c = 0; c < V; ++c) sum[r][c] = vfma(w, x[c], sum[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < V; ++c) vstore(acc + r * acc_stride + c * kLanes, sum[r][c]);
  }
}

// sum_values over all channels.
template <int R, bool kAsk, typename T>
void value_tiles(float* acc, int64_t acc_stride, const float* weights, const T* v,
                 const int64_t* offsets, int64_t begin, int64_t end, int64_t dim,
                 const Ahead<T>& ahead) {
  constexpr int V = R == 1 ? 8 : kValueVecs;
  int64_t d = 0;
  const auto slice = [&](auto vecs, auto half) {
    sum_values<R, vecs, half, kAsk>(acc + d, acc_stride, weights, v + d, offsets, begin, end,
                                    Ahead<T>{ahead.base + (kAsk ? d : 0), ahead.offsets});
    d += vecs * kLanes;
  };
  using std::integral_constant;
  while (d + V * kLanes <= dim) slice(integral_constant<int, V>{}, std::false_type{});
  while (V > 4 && d + 4 * kLanes <= dim) slice(integral_constant<int, 4>{}, std::false_type{});
  while (d + 2 * kLanes <= dim) slice(integral_constant<int, 2>{}, std::false_type{});
  while (d + kLanes <= dim) slice(integral_constant<int, 1>{}, std::false_type{});
  if (d < dim) slice(integral_constant<int, 1>{}, std::true_type{});
}

template <int R, typename T>
void value_rows(float* acc, int64_t acc_stride, const float* weights, const T* v,
                const int64_t* offsets, int64_t begin, int64_t end, int64_t dim,
                const Ahead<T>& ahead = {}) {
  if (begin >= end) return;
  if (ahead.base != nullptr) {
    value_tiles<R, true>(acc, acc_stride, weights, v, offsets, begin, end, dim, ahead);
  } else {
    value_tiles<R, false>(acc, acc_stride, weights, v, offsets, begin, end, dim, ahead);
  }
}

}  // namespace inferlab::cpu::INFERLAB_ISA
