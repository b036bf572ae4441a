// Attention on bf16 K and V by AMX. Tiles are loaded straight from the pages, 16 slots of one head
// at a time, from lines that were asked for a few thousand cycles before (Ahead):
//
//   scores   keys (16 keys x 32 channels) times q (16 pairs of channels x rows)
//   sums     weights (rows x 16 keys) times values (16 keys x 32 channels)
//
// A tile of values pairs channels where the product wants pairs of keys. So each weight stands
// beside a zero: (w, 0) selects the even channels, (0, w) the odd ones. That doubles the work of
// AMX, which has nothing else to do, and spares the vector units all of it.
//
// A score is the same for every row and key, whatever tile they stand in. A row's sum takes its
// keys in blocks of 16 places of the chunk, and who stands beside the row makes no difference, as
// long as what has weight 0 is finite; the caller sees to the rest.
#pragma once

#include <algorithm>
#include <cstring>

#include "amx.h"
#include "attention_ahead.h"
#include "attention_tiles.h"
#include "isa.h"

namespace inferlab::cpu::INFERLAB_ISA {

constexpr int64_t kBlock = 16;  // keys of a tile

// Where channel d stands in a row of sums: the even ones of 32, then the odd ones.
inline int64_t tile_place(int64_t d) { return (d & ~int64_t{31}) + (d & 1) * 16 + (d % 32) / 2; }

// Four columns of a 16-row tile of sums as four vectors, times `scale`.
inline void tile_columns(const float* sums, int64_t stride, float scale, vf* columns) {
  __m512 quad[4];  // rows 4 i .. 4 i + 3, four columns each
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, sums += 4 * stride) {
    quad[i] = _mm512_castps128_ps512(_mm_loadu_ps(sums));
    quad[i] = _mm512_insertf32x4(quad[i], _mm_loadu_ps(sums + stride), 1);
    quad[i] = _mm512_insertf32x4(quad[i], _mm_loadu_ps(sums + 2 * stride), 2);
    quad[i] = _mm512_insertf32x4(quad[i], _mm_loadu_ps(sums + 3 * stride), 3);
  }
  const __m512i ends = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 3, 7, 11, 15, 19, 23, 27, 31);
  const __m512i middle =
      _mm512_setr_epi32(1, 5, 9, 13, 17, 21, 25, 29, 2, 6, 10, 14, 18, 22, 26, 30);
  const __m512 e0 = _mm512_permutex2var_ps(quad[0], ends, quad[1]);
  const __m512 e1 = _mm512_permutex2var_ps(quad[2], ends, quad[3]);
  const __m512 m0 = _mm512_permutex2var_ps(quad[0], middle, quad[1]);
  const __m512 m1 = _mm512_permutex2var_ps(quad[2], middle, quad[3]);
  const __m512 s = _mm512_set1_ps(scale);
  columns[0] = {_mm512_mul_ps(_mm512_shuffle_f32x4(e0, e1, 0x44), s)};
  columns[1] = {_mm512_mul_ps(_mm512_shuffle_f32x4(m0, m1, 0x44), s)};
  columns[2] = {_mm512_mul_ps(_mm512_shuffle_f32x4(m0, m1, 0xEE), s)};
  columns[3] = {_mm512_mul_ps(_mm512_shuffle_f32x4(e0, e1, 0xEE), s)};
}

// Exponentials of a row -> weights: rounded to bf16 in the high half of each dword in place, in the
// low half in `even`, and 0 where `keys` are not.
inline void split_weights(float* odd, float* even, Range keys) {
  if (keys.empty()) keys = {0, 0};
  const int64_t first = keys.begin & ~int64_t{15}, last = (keys.end + 15) & ~int64_t{15};
  std::fill(odd, odd + first, 0.0f);
  std::fill(even, even + first, 0.0f);
  for (int64_t i = first; i < last; i += 16) {  // soften has put 0 up to whole vectors
    const __m512i x = _mm512_loadu_si512(odd + i);
    const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(tie, _mm512_set1_epi32(0x7fff));
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(x, half), 16);
    _mm512_storeu_si512(even + i, low);
    _mm512_storeu_si512(odd + i, _mm512_slli_epi32(low, 16));
  }
  std::fill(odd + last, odd + kChunk, 0.0f);
  std::fill(even + last, even + kChunk, 0.0f);
}

// 16 keys or values of one head: in a page, or laid out.
struct Block16 {
  const bf16* first;
  int64_t stride;  // elements
};

// q of one task, and its products with keys and values; `rows` are of one head.
class TileProducts {
 public:
  static bool usable(int64_t head_dim) {
    return active_isa() == Isa::kAmx && head_dim % kChannels == 0;
  }

  // `memory`: tile_products_floats(heads, rows, dim).
  TileProducts(float* memory, int64_t heads, int64_t rows, int64_t dim, float scale)
      : laid_(reinterpret_cast<bf16*>(memory)),
        pairs_(reinterpret_cast<uint32_t*>(laid_ + kTile * dim)),
        rows_(rows),
        dim_(dim),
        columns_(rows <= 4 ? 4 : 16),
        blocks_((rows + columns_ - 1) / columns_),
        steps_(dim / kChannels),
        scale_(scale) {
    std::fill_n(pairs_, heads * blocks_ * block_size(), 0u);
  }

  // Shapes the tile registers for score and sum.
  TileScope enter() const {
    if (rows_ > 16) return TileScope(static_cast<int>(columns_));
    return TileScope(static_cast<int>(columns_), static_cast<int>(rows_));
  }

  void set_row(int64_t h, int64_t r, const bf16* q) {
    uint32_t* to = block(h, r / columns_) + r % columns_;
    for (int64_t i = 0; i < dim_ / 2; ++i) {
      std::memcpy(to + i * columns_, q + 2 * i, sizeof *to);
    }
  }

  // A block laid out as number `at` of kTile / kBlock: place i < 16 is from + offsets[i], or zeros
  // outside of `keys`.
  Block16 lay(int64_t at, const bf16* from, const int64_t* offsets, Range keys) {
    bf16* to = laid_ + at * kBlock * dim_;
    for (int64_t i = 0; i < kBlock; ++i) {
      const bool in = i >= keys.begin && i < keys.end;
      for (int64_t d = 0; d < dim_; d += kChannels) {
        const __m512i x = in ? _mm512_loadu_si512(from + offsets[i] + d) : _mm512_setzero_si512();
        _mm512_store_si512(to + i * dim_ + d, x);
      }
    }
    return {to, dim_};
  }

  // scores[r * kScoreStride + i], of row r with the block's key i, for the rows given. Asks for as
  // many lines of `ahead` as it reads.
  void score(int64_t h, Range rows, Block16 keys, float* scores, SlotsAhead* ahead) const {
    const int64_t first = rows.begin / columns_, last = (rows.end - 1) / columns_;
    for (int64_t b = first; b <= last; b += 2) {
      const uint32_t* q = block(h, b);
      const uint32_t* q_next = q + block_size();
      const bool more = b < last;
      tile_zero<0>();
      tile_zero<1>();
      for (int64_t c = 0; c < steps_; ++c) {
        if (b == first && ahead != nullptr) ahead->ask(kBlock);
        tile_load<4>(keys.first + c * kChannels, 2 * keys.stride);
        tile_load<6>(q + c * 16 * columns_, 4 * columns_);
        tile_dot<0, 4, 6>();
        if (more) {
          tile_load<6>(q_next + c * 16 * columns_, 4 * columns_);
          tile_dot<1, 4, 6>();
        }
      }
      store_scores<0>(b, rows, scores);
      if (more) store_scores<1>(b + 1, rows, scores);
    }
  }

  // acc[r * stride + tile_place(d)] += sum over blocks i < count of weights[r][16 i ..] times the
  // values, for the rows given. odd, even: weights of head h's row 0 at the first block.
  void sum(Range rows, const Block16* values, int64_t count, const float* odd, const float* even,
           float* acc, int64_t stride, SlotsAhead* ahead, int64_t lines) const {
    if (rows_ <= 16) {
      for (int64_t c = 0; c < steps_; ++c) {
        float* to = acc + c * kChannels;
        tile_load<2>(to, 4 * stride);
        tile_load<3>(to + 16, 4 * stride);
        for (int64_t i = 0; i < count; ++i) {
          if (ahead != nullptr) ahead->ask(lines);
          tile_load<4>(values[i].first + c * kChannels, 2 * values[i].stride);
          tile_load<7>(even + i * kBlock, 4 * kScoreStride);
          tile_dot<2, 7, 4>();
          tile_load<7>(odd + i * kBlock, 4 * kScoreStride);
          tile_dot<3, 7, 4>();
        }
        store_sums<2>(0, rows, to, stride);
        store_sums<3>(0, rows, to + 16, stride);
      }
      return;
    }
    const int64_t first = rows.begin & ~int64_t{15};
    for (int64_t c = 0; c < steps_; ++c) {
      for (int64_t r = first; r < rows.end; r += 32) {
        const bool more = r + 16 < rows.end;
        float* to = acc + r * stride + c * kChannels;
        float* to_next = to + 16 * stride;
        tile_load<0>(to, 4 * stride);
        tile_load<1>(to + 16, 4 * stride);
        if (more) {
          tile_load<2>(to_next, 4 * stride);
          tile_load<3>(to_next + 16, 4 * stride);
        }
        for (int64_t i = 0; i < count; ++i) {
          if (r == first && ahead != nullptr) ahead->ask(lines);
          const int64_t at = r * kScoreStride + i * kBlock;
          tile_load<6>(values[i].first + c * kChannels, 2 * values[i].stride);
          tile_load<4>(even + at, 4 * kScoreStride);
          tile_dot<0, 4, 6>();
          tile_load<5>(odd + at, 4 * kScoreStride);
          tile_dot<1, 5, 6>();
          if (more) {
            tile_load<4>(even + at + 16 * kScoreStride, 4 * kScoreStride);
            tile_dot<2, 4, 6>();
            tile_load<5>(odd + at + 16 * kScoreStride, 4 * kScoreStride);
            tile_dot<3, 5, 6>();
          }
        }
        store_sums<0>(r, rows, to, stride);
        store_sums<1>(r, rows, to + 16, stride);
        if (more) {
          store_sums<2>(r + 16, rows, to_next, stride);
          store_sums<3>(r + 16, rows, to_next + 16, stride);
        }
      }
    }
  }

 private:
  static constexpr int64_t kChannels = kAmxChannels;

  int64_t block_size() const { return steps_ * 16 * columns_; }
  uint32_t* block(int64_t h, int64_t b) const { return pairs_ + (h * blocks_ + b) * block_size(); }

  template <int kSum>
  void store_scores(int64_t b, Range rows, float* scores) const {
    alignas(64) float sums[16 * 16];
    tile_store<kSum>(sums, 4 * columns_);
    const int64_t first = b * columns_;
    const Range here = intersect(rows, {first, std::min(first + columns_, rows_)});
    for (int64_t r = first + ((here.begin - first) & ~int64_t{3}); r < here.end; r += 4) {
      vf columns[4];
      tile_columns(sums + r - first, columns_, scale_, columns);
      for (int64_t j = std::max(r, here.begin); j < std::min(r + 4, here.end); ++j) {
        vstore(scores + j * kScoreStride, columns[j - r]);
      }
    }
  }

  // Rows r .. of a tile of sums; only those of `rows` are written.
  template <int kSum>
  void store_sums(int64_t r, Range rows, float* to, int64_t stride) const {
    const int64_t height = std::min<int64_t>(rows_, 16);
    if (rows.begin <= r && r + height <= rows.end) {
      tile_store<kSum>(to, 4 * stride);
      return;
    }
    alignas(64) float sums[16 * 16];
    tile_store<kSum>(sums, 64);
    const Range here = intersect(rows, {r, r + height});
    for (int64_t i = here.begin - r; i < here.end - r; ++i) {
      vstore(to + i * stride, vload(sums + i * 16));
    }
  }

  bf16* const laid_;       // [kTile, dim]: what cannot be loaded from a page
  uint32_t* const pairs_;  // [heads, blocks, dim / 2, columns]: two channels of a row
  const int64_t rows_, dim_;
  const int64_t columns_, blocks_, steps_;
  const float scale_;
};

}  // namespace inferlab::cpu::INFERLAB_ISA
