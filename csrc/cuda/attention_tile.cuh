// What one warp of paged_tree_attention computes for its 16 rows on one tile of keys: scores, and
// weights times values, on tensor cores (MmaTile) or with fp32 multiply-adds (FmaTile). Both hold
// numbers as tensor cores do: of each 16 x 8 block a lane has columns 2t, 2t + 1 of rows g and
// g + 8, where g = lane / 4, t = lane % 4.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "convert.cuh"
#include "mma.cuh"

namespace inferlab::cuda {

constexpr int kTileBytes = 16 * 1024;  // K and V

constexpr int common_divisor(int a, int b) { return b == 0 ? a : common_divisor(b, a % b); }

constexpr int keys_per_tile(int row_bytes) {
  int keys = 64;
  while (2 * keys * row_bytes > kTileBytes) keys /= 2;
  return keys;
}

// K or V of a tile: rows of 16-byte chunks. Chunks of successive rows are exchanged such that the
// same chunk of 8 successive keys lies in different banks, and so do 8 threads' 16-byte accesses.
template <typename T, int D>
struct TileLayout {
  static constexpr int kChunkElements = 16 / sizeof(T);
  static constexpr int kChunks = D / kChunkElements;
  static constexpr int kKeys = keys_per_tile(D * sizeof(T));
  static constexpr int kBytes = kKeys * kChunks * 16;
  static constexpr unsigned kSpread = common_divisor(kChunks, 8);  // chunks exchanged in groups

  static __device__ __forceinline__ unsigned offset(unsigned key, unsigned chunk) {
    const unsigned exchange = key * kSpread / 8 % kSpread;
    return 16 * (key * kChunks + chunk / kSpread * kSpread + (chunk % kSpread ^ exchange));
  }
};

// Columns are dealt to `kColumnWarps` warps in blocks of 16; the scores each of them computes
// whole.
template <int D, int kColumnWarps>
struct WarpColumns {
  static constexpr int kBlocks = (D / 16 + kColumnWarps - 1) / kColumnWarps;
  static __device__ __forceinline__ unsigned block(unsigned warp_column, unsigned i) {
    return warp_column + kColumnWarps * i;
  }
  static __device__ __forceinline__ bool exists(unsigned block) {
    return D / 16 % kColumnWarps == 0 || block < D / 16;
  }
};

// The two rows of q that a lane holds; null where there is none.
template <typename T>
struct QueryRows {
  const T* row[2];
  int dim;
  bool pairs;  // two elements can be read at a time
};

template <typename T, int D, int kColumnWarps>
struct MmaTile {
  using Layout = TileLayout<T, D>;
  using Columns = WarpColumns<D, kColumnWarps>;
  static constexpr int kScoreBlocks = Layout::kKeys / 8;
  static constexpr int kOutBlocks = 2 * Columns::kBlocks;
  struct Shared {};

  uint32_t q[D / 16][4];
  unsigned lane, warp_column;

  __device__ __forceinline__ MmaTile(Shared&, unsigned lane_, unsigned warp_column_)
      : lane(lane_), warp_column(warp_column_) {}

  __device__ __forceinline__ void load_queries(const QueryRows<T>& rows) {
#pragma unroll
    for (int s = 0; s < D / 16; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 16 * s + 8 * (i / 2) + 2 * (lane % 4);
        q[s][i] = load_pair(rows, i % 2, column);
      }
    }
  }

  // s[j]: keys 8j to 8j + 7
  __device__ __forceinline__ void scores(float (&s)[kScoreBlocks][4],
                                         const unsigned char* k) const {
    const unsigned key = lane % 8 + lane / 16 * 8, chunk = lane / 8 % 2;
#pragma unroll
    for (int j = 0; j < kScoreBlocks; j += 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = s[j + 1][i] = 0.0f;
#pragma unroll
      for (int c = 0; c < D / 16; ++c) {
        uint32_t b[4];
        load_matrices(b, k + Layout::offset(8 * j + key, 2 * c + chunk));
        mma<T>(s[j], q[c], b[0], b[1]);
        mma<T>(s[j + 1], q[c], b[2], b[3]);
      }
    }
  }

  // out += weights * v. Values of keys that are not in `keep` count as 0, whatever they are.
  template <bool kMasked>
  __device__ __forceinline__ void accumulate(float (&out)[kOutBlocks][4],
                                             const float (&w)[kScoreBlocks][4],
                                             const unsigned char* v, uint64_t keep) const {
    const unsigned key = lane % 16, chunk = lane / 16 % 2;
    keep >>= 2 * (lane % 4);  // keys 8j + 2t at bits 8j
#pragma unroll
    for (int j = 0; j < kScoreBlocks; j += 2) {
      const uint32_t a[4] = {pack_pair_but_nan<T>(w[j][0], w[j][1]),
                             pack_pair_but_nan<T>(w[j][2], w[j][3]),
                             pack_pair_but_nan<T>(w[j + 1][0], w[j + 1][1]),
                             pack_pair_but_nan<T>(w[j + 1][2], w[j + 1][3])};
      uint32_t kept[2];
      if (kMasked) {
        kept[0] = halves(keep >> 8 * j);
        kept[1] = halves(keep >> (8 * j + 8));
      }
#pragma unroll
      for (int i = 0; i < Columns::kBlocks; ++i) {
        const unsigned block = Columns::block(warp_column, i);
        if (!Columns::exists(block)) continue;
        uint32_t b[4];
        load_matrices_transposed(b, v + Layout::offset(8 * j + key, 2 * block + chunk));
        if (kMasked) {
          b[0] &= kept[0], b[1] &= kept[1], b[2] &= kept[0], b[3] &= kept[1];
        }
        mma<T>(out[2 * i], a, b[0], b[1]);
        mma<T>(out[2 * i + 1], a, b[2], b[3]);
      }
    }
  }

 private:
  static __device__ __forceinline__ uint32_t load_pair(const QueryRows<T>& rows, int i,
                                                       int column) {
    if (rows.row[i] == nullptr || column >= rows.dim) return 0;
    if (rows.pairs) return *reinterpret_cast<const uint32_t*>(rows.row[i] + column);
    return rows.row[i][column].bits | static_cast<uint32_t>(rows.row[i][column + 1].bits) << 16;
  }

  // Bits 0 and 1, each 16 times.
  static __device__ __forceinline__ uint32_t halves(uint64_t bits) {
    return (bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u);
  }
};

template <int D, int kColumnWarps>
struct FmaTile {
  using Layout = TileLayout<float, D>;
  using Columns = WarpColumns<D, kColumnWarps>;
  static constexpr int kScoreBlocks = Layout::kKeys / 8;
  static constexpr int kOutBlocks = 2 * Columns::kBlocks;
  struct Shared {
    float q[16][D + 4];  // 16 bytes of padding: rows lie in different banks
  };

  Shared& shared;
  unsigned lane, warp_column;

  __device__ __forceinline__ FmaTile(Shared& shared_, unsigned lane_, unsigned warp_column_)
      : shared(shared_), lane(lane_), warp_column(warp_column_) {}

  // Every column warp brings its share; a barrier must follow.
  __device__ __forceinline__ void load_queries(const QueryRows<float>& rows) {
    for (int c = lane % 4 + 4 * warp_column; c < D; c += 4 * kColumnWarps) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool exists = rows.row[i] != nullptr && c < rows.dim;
        shared.q[lane / 4 + 8 * i][c] = exists ? rows.row[i][c] : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void scores(float (&s)[kScoreBlocks][4],
                                         const unsigned char* k) const {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < kScoreBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] = 0.0f;
    }
#pragma unroll 2
    for (int c = 0; c < Layout::kChunks; ++c) {
      const float4 q0 = *reinterpret_cast<const float4*>(&shared.q[g][4 * c]);
      const float4 q8 = *reinterpret_cast<const float4*>(&shared.q[g + 8][4 * c]);
#pragma unroll
      for (int j = 0; j < kScoreBlocks; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = 8 * j + 2 * t + i;
          const float4 x = *reinterpret_cast<const float4*>(k + Layout::offset(key, c));
          s[j][i] = dot(q0, x, s[j][i]);
          s[j][i + 2] = dot(q8, x, s[j][i + 2]);
        }
      }
    }
  }

  template <bool kMasked>
  __device__ __forceinline__ void accumulate(float (&out)[kOutBlocks][4],
                                             const float (&w)[kScoreBlocks][4],
                                             const unsigned char* v, uint64_t keep) const {
    const int t = lane % 4;
#pragma unroll
    for (int j = 0; j < kScoreBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int owner = lane - t + i / 2;  // the lane of this row that has key 8j + i
        const float w0 = __shfl_sync(0xffffffffu, w[j][i % 2], owner);
        const float w8 = __shfl_sync(0xffffffffu, w[j][i % 2 + 2], owner);
        const int key = 8 * j + i;
        if (kMasked && !(keep >> key & 1)) continue;
#pragma unroll
        for (int o = 0; o < kOutBlocks; ++o) {
          const unsigned block = Columns::block(warp_column, o / 2);
          if (!Columns::exists(block)) continue;
          const int column = 16 * block + 8 * (o % 2) + 2 * t;
          const float2 x = *reinterpret_cast<const float2*>(v + Layout::offset(key, column / 4) +
                                                            4 * (column % 4));
          out[o][0] = __fmaf_rn(w0, x.x, out[o][0]);
          out[o][1] = __fmaf_rn(w0, x.y, out[o][1]);
          out[o][2] = __fmaf_rn(w8, x.x, out[o][2]);
          out[o][3] = __fmaf_rn(w8, x.y, out[o][3]);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ float dot(const float4& a, const float4& b, float sum) {
    sum = __fmaf_rn(a.x, b.x, sum);
    sum = __fmaf_rn(a.y, b.y, sum);
    sum = __fmaf_rn(a.z, b.z, sum);
    return __fmaf_rn(a.w, b.w, sum);
  }
};

template <typename T, int D, int kColumnWarps>
using Tile = std::conditional_t<std::is_same_v<T, float>, FmaTile<D, kColumnWarps>,
                                MmaTile<T, D, kColumnWarps>>;

}  // namespace inferlab::cuda
