// Scores of bf16 keys by AMX: 16 keys, straight from their page, times up to 16 rows of q in 16
// cycles per 32 channels. The sum over channels is the same for every row and key, whatever tile
// they stand in.
#pragma once

#include <algorithm>
#include <cstring>

#include "amx.h"
#include "attention_tiles.h"
#include "isa.h"

namespace inferlab::cpu::INFERLAB_ISA {

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

// The rows of q of one task, and the scores of keys with them.
class QueryTiles {
 public:
  static bool usable(int64_t head_dim) {
    return active_isa() == Isa::kAmx && head_dim % kChannels == 0;
  }

  // `memory`: query_tile_floats(heads, rows, dim). rows are of one head.
  QueryTiles(float* memory, int64_t heads, int64_t rows, int64_t dim, float scale)
      : keys_(reinterpret_cast<bf16*>(memory)),
        pairs_(reinterpret_cast<uint32_t*>(memory + kTile * dim / 2)),
        columns_(rows <= 4 ? 4 : 16),
        blocks_((rows + columns_ - 1) / columns_),
        steps_(dim / kChannels),
        rows_(rows),
        scale_(scale) {
    std::fill_n(pairs_, heads * blocks_ * block_size(), 0u);
  }

  int columns() const { return static_cast<int>(columns_); }

  void set_row(int64_t h, int64_t r, const bf16* q) {
    uint32_t* to = block(h, r / columns_) + r % columns_;
    for (int64_t i = 0; i < steps_ * kChannels / 2; ++i) {
      std::memcpy(to + i * columns_, q + 2 * i, sizeof *to);
    }
  }

  // Lays rows [keys.begin, keys.end) of `offsets`, kTile at most, side by side, and asks for
  // `ahead` on the way. Tiles are not loaded from the pages, since few of them can wait for memory
  // at once.
  void copy_keys(const bf16* from, const int64_t* offsets, Range keys, const Ahead<bf16>& ahead) {
    bf16* to = keys_;
    for (int64_t i = keys.begin; i < keys.end; ++i, to += steps_ * kChannels) {
      if (ahead.base != nullptr) ahead.ask(i, 0, steps_ * kChannels);
      const bf16* key = from + offsets[i];
      for (int64_t d = 0; d < steps_ * kChannels; d += kChannels) {
        _mm512_store_si512(to + d, _mm512_loadu_si512(key + d));
      }
    }
  }

  // scores[r * kScoreStride + i], of row r with copied key i < count, for the rows given.
  void score(int64_t h, Range rows, int64_t count, float* scores) const {
    const int64_t first = rows.begin / columns_, last = (rows.end - 1) / columns_;
    const int64_t key_stride = steps_ * kChannels;
    for (int64_t i = 0; i < count; i += 32) {
      const bf16* key = keys_ + i * key_stride;
      const bool more_keys = i + 16 < count;
      for (int64_t b = first; b <= last; b += 2) {
        const uint32_t* q = block(h, b);
        const uint32_t* q_next = q + block_size();
        const bool more_rows = b < last;
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
        for (int64_t c = 0; c < steps_; ++c) {
          tile_load<6>(q + c * 16 * columns_, 4 * columns_);
          tile_load<4>(key + c * kChannels, 2 * key_stride);
          tile_dot<0, 4, 6>();
          if (more_keys) {
            tile_load<5>(key + 16 * key_stride + c * kChannels, 2 * key_stride);
            tile_dot<1, 5, 6>();
          }
          if (more_rows) {
            tile_load<7>(q_next + c * 16 * columns_, 4 * columns_);
            tile_dot<2, 4, 7>();
            if (more_keys) tile_dot<3, 5, 7>();
          }
        }
        store<0>(b, rows, scores + i);
        if (more_keys) store<1>(b, rows, scores + i + 16);
        if (more_rows) store<2>(b + 1, rows, scores + i);
        if (more_rows && more_keys) store<3>(b + 1, rows, scores + i + 16);
      }
    }
  }

 private:
  static constexpr int64_t kChannels = 32;

  int64_t block_size() const { return steps_ * 16 * columns_; }
  uint32_t* block(int64_t h, int64_t b) const { return pairs_ + (h * blocks_ + b) * block_size(); }

  template <int kTile>
  void store(int64_t b, Range rows, float* scores) const {
    alignas(64) float sums[16 * 16];
    tile_store<kTile>(sums, 4 * columns_);
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

  bf16* const keys_;       // [kTile, dim]
  uint32_t* const pairs_;  // [heads, blocks, dim / 2, columns]: two channels of a row
  const int64_t columns_, blocks_, steps_, rows_;
  const float scale_;
};

}  // namespace inferlab::cpu::INFERLAB_ISA
