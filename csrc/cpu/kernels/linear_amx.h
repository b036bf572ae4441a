// bf16 products by AMX: 16 outputs, straight from W's rows, times 16 rows of x in 16 cycles per 32
// inputs, while the same 1 KB of W takes some 190 cycles to come from memory. So up to 32 rows cost
// little more than one. Bytes: W once, x twice (it is laid out in pairs first), y once.
//
// A sum takes its products in the order of k from tiles of one shape, so its bits depend neither on
// its place in a tile nor on what else is in it. AMX reads subnormal bf16 as zero.
#pragma once

#include <algorithm>
#include <utility>

#include "amx.h"
#include "inferlab/linear.h"
#include "isa.h"
#include "simd.h"

namespace inferlab::cpu::INFERLAB_ISA {

class LinearTiles {
 public:
  static bool usable(const LinearParams& p) {
    return active_isa() == Isa::kAmx && p.dtype == DType::kBF16;
  }

  static int64_t scratch_floats(const LinearParams& p) {
    return row_tiles(p) * steps(p) * 16 * columns(p);
  }

  // Lays pairs of inputs side by side, zero beyond the last row and input:
  // pairs[rows / 16][in / 32][16 pairs][16 rows]. A single row has this order already.
  static void pack(const LinearParams& p, float* scratch) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(scratch);
    const bf16* x = static_cast<const bf16*>(p.x);
    for (int64_t row = 0; row < p.rows; row += 16) {
      const int64_t rows = std::min<int64_t>(16, p.rows - row);
      for (int64_t k = 0; k < p.in; k += 32, pairs += 16 * columns(p)) {
        const __mmask32 inside = first_lanes(p.in - k);
        __m512i quads[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
          quads[r] = r < rows ? _mm512_maskz_loadu_epi16(inside, x + (row + r) * p.x_stride + k)
                              : _mm512_setzero_si512();
        }
        if (p.rows == 1) {
          _mm512_storeu_si512(pairs, quads[0]);
          continue;
        }
        transpose(quads);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(pairs + 16 * i, quads[i]);
      }
    }
  }

  LinearTiles(const LinearParams& p, const float* scratch)
      : p_(p),
        weight_(static_cast<const bf16*>(p.weight)),
        pairs_(reinterpret_cast<const uint32_t*>(scratch)),
        steps_(steps(p)),
        columns_(columns(p)) {}

  // Outputs [begin, end) of all rows.
  void outputs(int64_t begin, int64_t end) {
    const TileScope scope(static_cast<int>(columns_));
    ask_at_ = reinterpret_cast<const char*>(weight_ + begin * p_.in);
    ask_end_ = reinterpret_cast<const char*>(weight_ + end * p_.in);
    const int64_t tiles = row_tiles(p_);
    const int64_t tall = tiles <= 2 ? 32 : 16;
    ask(std::min(tall, end - begin) * p_.in);
    int64_t n = begin;
    if (tiles <= 2) {
      for (; n + 32 <= end; n += 32) tiles == 1 ? block<2, 1>(n, 0) : block<2, 2>(n, 0);
    }
    for (; n < end; n += 16) {
      int64_t tile = 0;
      for (; tile + 4 <= tiles; tile += 4) block<1, 4>(n, tile);
      if (tiles - tile == 3) block<1, 3>(n, tile);
      if (tiles - tile == 2) block<1, 2>(n, tile);
      if (tiles - tile == 1) block<1, 1>(n, tile);
    }
  }

 private:
  static int64_t row_tiles(const LinearParams& p) { return (p.rows + 15) / 16; }
  static int64_t steps(const LinearParams& p) { return (p.in + 31) / 32; }
  static int64_t columns(const LinearParams& p) { return p.rows == 1 ? 1 : 16; }

  static __mmask32 first_lanes(int64_t count) {
    return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << std::max<int64_t>(count, 0)) - 1;
  }

  // 16 x 16 dwords.
  static void transpose(__m512i* r) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    // Lane L of r[i + c]: column 4 L + c of rows i .. i + 3.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
        r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i even_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
      const __m512i odd_low = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xDD);
      const __m512i even_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
      const __m512i odd_high = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xDD);
      r[c] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
      r[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
      r[8 + c] = _mm512_shuffle_i32x4(even_low, even_high, 0xDD);
      r[12 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xDD);
    }
  }

  // Rounds to nearest even and widens again, as from_float<bf16> and to_float.
  static __m512i round(__m512 a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16);
  }

  // Asks for the next `elements` of W, in the order of memory: tiles are loaded a line of each of
  // 16 rows at a time, and few such loads can wait for memory at once.
  void ask(int64_t elements) {
    const char* end = std::min(ask_end_, ask_at_ + elements * 2);
    for (; ask_at_ < end; ask_at_ += 64) _mm_prefetch(ask_at_, _MM_HINT_T1);
  }

  // Outputs [n, n + 16 kHigh) of the rows of kWide tiles from `tile`.
  template <int kHigh, int kWide>
  void block(int64_t n, int64_t tile) {
    zero(std::make_integer_sequence<int, kHigh * kWide>());
    for (int64_t step = 0; step < steps_; ++step) {
      ask(16 * kHigh * 32);
      multiply<kHigh, kWide>(n, tile, step, std::make_integer_sequence<int, kHigh * kWide>());
    }
    store<kHigh, kWide>(n, tile, std::make_integer_sequence<int, kHigh * kWide>());
  }

  template <int... kSums>
  static void zero(std::integer_sequence<int, kSums...>) {
    (tile_zero<kSums>(), ...);
  }

  template <int kHigh, int kWide, int... kSums>
  void multiply(int64_t n, int64_t tile, int64_t step, std::integer_sequence<int, kSums...>) {
    (multiply_one<kHigh, kWide, kSums / kWide, kSums % kWide>(n, tile, step), ...);
  }

  template <int kHigh, int kWide, int kI, int kJ>
  void multiply_one(int64_t n, int64_t tile, int64_t step) {
    static_assert(kHigh == 1 || kWide <= 2, "a tile of x is loaded once per step");
    if constexpr (kJ == 0) load_weight<4 + kI>(n + 16 * kI, step);
    if constexpr (kI == 0) {
      tile_load<6 + kJ % 2>(pairs_ + ((tile + kJ) * steps_ + step) * 16 * columns_, 4 * columns_);
    }
    tile_dot<kI * kWide + kJ, 4 + kI, 6 + kJ % 2>();
  }

  template <int kTile>
  void load_weight(int64_t n, int64_t step) {
    const bf16* w = weight_ + n * p_.in + 32 * step;
    if (n + 16 <= p_.out && 32 * step + 32 <= p_.in) {
      tile_load<kTile>(w, 2 * p_.in);
      return;
    }
    alignas(64) bf16 padded[16 * 32];
    const __mmask32 inside = first_lanes(p_.in - 32 * step);
    for (int64_t i = 0; i < 16; ++i) {
      const __mmask32 mask = n + i < p_.out ? inside : 0;
      _mm512_store_si512(padded + 32 * i, _mm512_maskz_loadu_epi16(mask, w + i * p_.in));
    }
    tile_load<kTile>(padded, 64);
  }

  template <int kHigh, int kWide, int... kSums>
  void store(int64_t n, int64_t tile, std::integer_sequence<int, kSums...>) {
    (store_one<kSums>(n + 16 * (kSums / kWide), 16 * (tile + kSums % kWide)), ...);
  }

  // Outputs [n, n + 16) of 16 rows.
  template <int kSum>
  void store_one(int64_t n, int64_t row) {
    alignas(64) float sums[16 * 16];
    tile_store<kSum>(sums, 4 * columns_);
    if (columns_ == 1) {
      finish(n, row, _mm512_load_ps(sums));
      return;
    }
    __m512i quads[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) quads[i] = _mm512_load_si512(sums + 16 * i);
    transpose(quads);
    const int64_t rows = std::min<int64_t>(16, p_.rows - row);
    for (int64_t r = 0; r < rows; ++r) finish(n, row + r, _mm512_castsi512_ps(quads[r]));
  }

  // Bias and residual, with roundings in the order of the unfused layer.
  void finish(int64_t n, int64_t row, __m512 sum) const {
    const __mmask16 inside = static_cast<__mmask16>(first_lanes(p_.out - n));
    const auto load = [&](const void* from, int64_t at) {
      const __m256i half = _mm256_maskz_loadu_epi16(inside, static_cast<const bf16*>(from) + at);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    };
    const int64_t at = row * p_.out + n;
    if (p_.bias != nullptr) sum = _mm512_add_ps(sum, load(p_.bias, n));
    __m512i rounded = round(sum);
    if (p_.residual != nullptr) {
      const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(rounded, 16));
      rounded = round(_mm512_add_ps(load(p_.residual, at), wide));
    }
    _mm256_mask_storeu_epi16(static_cast<bf16*>(p_.y) + at, inside, _mm512_cvtepi32_epi16(rounded));
  }

  const LinearParams& p_;
  const bf16* const weight_;
  const uint32_t* const pairs_;
  const int64_t steps_, columns_;
  const char *ask_at_ = nullptr, *ask_end_ = nullptr;  // of W, not yet asked for
};

}  // namespace inferlab::cpu::INFERLAB_ISA
