// Products with packed weights of 8 and 4 bits: packed_weight.h. W is read once for a block of
// rows, whose inputs, rounded to 8 bits, come from the first-level cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "inferlab/packed_weight.h"
#include "isa.h"
#include "linear_finish.h"
#include "packed_dot.h"
#include "simd.h"

namespace inferlab::cpu::INFERLAB_ISA {

// The rows of x in 8 bits, by group: their scales, and what a sum of products with q begins at:
// -zero times the sum of the inputs.
struct PackedRows {
  int64_t width, groups;
  int64_t at_once;  // rows of a block: of equal size, as few rows leave the multipliers idle
  int8_t* x;        // [blocks][width / 4][rows of the block][4], as add_group reads them
  float* scale;     // [rows, groups]
  int32_t* start;   // [rows, groups]; where zeros differ, of 1

  // With room for one row in order, whatever it is of.
  static int64_t scratch_floats(const LinearParams& p) {
    return p.rows * packed_groups(p) * (p.group * packed_input_bytes(p.bits) / 4 + 2) +
           (p.order != nullptr ? p.in : 0);
  }

  PackedRows(const LinearParams& p, float* scratch)
      : width(packed_groups(p) * p.group),
        groups(packed_groups(p)),
        at_once(rows_at_once(p.rows)),
        x(reinterpret_cast<int8_t*>(scratch)),
        scale(scratch + p.rows * width * packed_input_bytes(p.bits) / 4),
        start(reinterpret_cast<int32_t*>(scale + p.rows * groups)) {}

  static int64_t rows_at_once(int64_t rows) {
    const int64_t blocks = (rows + kPackedRows - 1) / kPackedRows;
    return (rows + blocks - 1) / blocks;
  }

  void round_rows(const LinearParams& p) const {
    with_dtype(p.dtype, [&](auto zero) {
      using T = decltype(zero);
      for (int64_t row = 0; row < p.rows; ++row) {
        const T* from = static_cast<const T*>(p.x) + row * p.x_stride;
        if (p.order != nullptr) {
          T* ordered = reinterpret_cast<T*>(start + p.rows * groups);
          for (int64_t i = 0; i < p.in; ++i) ordered[i] = from[p.order[i]];
          from = ordered;
        }
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t count = std::min(p.group, p.in - g * p.group);
          round_group(p, from + g * p.group, count, row, g);
        }
      }
    });
  }

 private:
  static constexpr int64_t kMostGroup = 128;
  static constexpr float kLargest = 3.4028234664e38f, kLeast = 1e-35f;
  static constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

  template <typename T>
  void round_group(const LinearParams& p, const T* from, int64_t count, int64_t row,
                   int64_t g) const {
    alignas(64) float wide[kMostGroup];
    vf most_of = vset(0.0f);
    bool finite = true;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const vf value = vload(from + i);
      const vf size = vmax(value, vset(0.0f) - value);
      most_of = vmax(size, most_of);
      finite = finite && vge(vset(kLargest), size) == kAllLanes;  // false for NaN
      vstore(wide + i, value);
    }
    float most = vreduce_max(most_of);
    for (; i < count; ++i) {
      wide[i] = to_float(from[i]);
      most = std::max(most, std::fabs(wide[i]));
      finite = finite && std::fabs(wide[i]) <= kLargest;
    }
    // Smaller ones would be 127 times an infinite inverse; they add nothing.
    const bool counts = finite && most >= kLeast;
    const float inverse = counts ? 127.0f / most : 0.0f;
    alignas(64) int8_t to[kMostGroup] = {};
    int32_t sum = 0;
    for (i = 0; counts && i < count; ++i) {
      // 1.5 * 2^23 leaves the nearest whole number, ties to even, in the low bits.
      const auto whole =
          static_cast<int32_t>(float_to_bits(wide[i] * inverse + 12582912.0f) - 0x4B400000u);
      to[i] = static_cast<int8_t>(whole);
      sum += whole;
    }
    const int64_t first = row - row % at_once, together = std::min(at_once, p.rows - first);
    const int64_t four = 4 * packed_input_bytes(p.bits);
    int8_t* place = x + (first * width + g * p.group * together) * four / 4 + four * (row - first);
    put_inputs(to, p.group, p.bits, place, four * together);
    // An input that is no number, or infinite, makes all outputs of its row NaN.
    scale[row * groups + g] = finite ? (counts ? most / 127.0f : 0.0f) : bits_to_float(0x7fc00000u);
    start[row * groups + g] = -(p.zeros ? 1 : p.bits == 8 ? kZeroOfBytes : 8) * sum;
  }
};

// How weights are packed and multiplied.
template <int kWeightBits, bool kHasZeros, bool kFastDot>
struct Packing {
  static constexpr int kBits = kWeightBits;
  static constexpr bool kZeros = kHasZeros, kFast = kFastDot;
  using Scale = std::conditional_t<kZeros, f16, bf16>;
};

// Outputs of M rows and V vectors of lanes: sums[m * stride + lane of all vectors].
template <typename By, int M, int V>
inline void packed_block(const LinearParams& p, const PackedRows& rows, int64_t row,
                         const uint8_t* const* tiles, float* sums, int64_t stride) {
  constexpr int kVectors = 16 / kLanes;  // of a tile
  const int64_t scale_bytes = packed_scale_bytes(p);
  const typename By::Scale* scales[V];
  const uint8_t* zeros[V];
  const uint8_t* q[V];
  vf acc[M][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const uint8_t* tile = tiles[v / kVectors];
    scales[v] = reinterpret_cast<const typename By::Scale*>(tile) + v % kVectors * kLanes;
    zeros[v] = tile + rows.groups * kPackedOutputs * 2 + v % kVectors * kLanes;
    q[v] = tile + scale_bytes + v % kVectors * kLanes * 4;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[m][v] = vset(0.0f);
  }
  constexpr int kInput = packed_input_bytes(By::kBits);
  const int8_t* x = rows.x + row * rows.width * kInput;
  for (int64_t g = 0; g < rows.groups; ++g, x += p.group * M * kInput) {
    vi dot[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vi start = vset(rows.start[(row + m) * rows.groups + g]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        if constexpr (By::kZeros) {
          dot[m][v] = start * widen_bytes(zeros[v] + g * kPackedOutputs);
        } else {
          dot[m][v] = start;
        }
      }
    }
    add_group<By::kBits, By::kFast>(dot, q, x, p.group);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const vf sx = vset(rows.scale[(row + m) * rows.groups + g]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        if constexpr (By::kBits == 8) {
          acc[m][v] = vfma(to_floats(dot[m][v]), sx, acc[m][v]);
        } else {
          const vf scale = vload(scales[v] + g * kPackedOutputs);
          acc[m][v] = vfma(to_floats(dot[m][v]) * sx, scale, acc[m][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const vf sum = By::kBits == 8 ? acc[m][v] * vload(scales[v]) : acc[m][v];
      vstore(sums + m * stride + v * kLanes, sum);
    }
  }
}

// `count` <= M rows.
template <typename By, int V, int M>
inline void packed_rows(const LinearParams& p, const PackedRows& rows, int64_t row, int64_t count,
                        const uint8_t* const* tiles, float* sums, int64_t stride) {
  if (count == M) {
    packed_block<By, M, V>(p, rows, row, tiles, sums, stride);
  } else if constexpr (M > 1) {
    packed_rows<By, V, M - 1>(p, rows, row, count, tiles, sums, stride);
  }
}

template <typename By>
void packed_tiles_of(const LinearParams& p, const float* scratch, int64_t begin, int64_t end) {
  constexpr int kVectors = 16 / kLanes;
  constexpr int kPair = 2 * static_cast<int>(kPackedOutputs);
  const PackedRows rows(p, const_cast<float*>(scratch));
  const int64_t bytes = packed_tile_bytes(p);
  const auto* weight = static_cast<const uint8_t*>(p.weight);
  alignas(64) float sums[kPackedRows * kPair];
  for (int64_t n = begin; n < end;) {
    // Two tiles where rows are too few to keep the multipliers busy.
    const bool pair = p.rows <= kPairRows && n + kPackedOutputs < end;
    const int64_t next = std::min(n + (pair ? kPair : kPackedOutputs), end);
    const uint8_t* tile = weight + n / kPackedOutputs * bytes;
    const uint8_t* const tiles[2] = {tile, tile + bytes};
    for (int64_t row = 0; row < p.rows; row += rows.at_once) {
      const int64_t count = std::min(rows.at_once, p.rows - row);
      if (pair) {
        packed_rows<By, 2 * kVectors, kPairRows>(p, rows, row, count, tiles, sums, kPair);
      } else {
        packed_rows<By, kVectors, kPackedRows>(p, rows, row, count, tiles, sums, kPair);
      }
      with_dtype(p.dtype, [&](auto zero) {
        for (int64_t r = 0; r < count; ++r) {
          finish_row<decltype(zero)>(p, row + r, n, next, sums + r * kPair);
        }
      });
    }
    n = next;
  }
}

template <int kBits, bool kZeros>
void packed_outputs_of(const LinearParams& p, const float* scratch, int64_t begin, int64_t end) {
  has_fast_dot() ? packed_tiles_of<Packing<kBits, kZeros, true>>(p, scratch, begin, end)
                 : packed_tiles_of<Packing<kBits, kZeros, false>>(p, scratch, begin, end);
}

// Outputs [begin, end) of all rows; begin is the first of a tile.
inline void packed_outputs(const LinearParams& p, const float* scratch, int64_t begin,
                           int64_t end) {
  if (p.bits == 8) return packed_outputs_of<8, false>(p, scratch, begin, end);
  p.zeros ? packed_outputs_of<4, true>(p, scratch, begin, end)
          : packed_outputs_of<4, false>(p, scratch, begin, end);
}

}  // namespace inferlab::cpu::INFERLAB_ISA
