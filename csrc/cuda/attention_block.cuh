// What a block of paged_tree_attention does with its part of the slots: which rows it has, how
// tiles of K and V come to shared memory, and the running softmax of each warp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "attention_rows.cuh"
#include "attention_tile.cuh"
#include "cp_async.cuh"

namespace inferlab::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 4;
constexpr int kPageStages = 2 * kStages;  // page ids come kStages - 1 tiles before their tile
constexpr size_t kMaxShared = 99 * 1024;  // of a block on sm_86, 89 and 120
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T, int D, int kRowTiles>
struct alignas(128) BlockShared {
  using WarpTile = Tile<T, D, kWarps / kRowTiles>;
  using Layout = TileLayout<T, D>;
  unsigned char k[kStages][Layout::kBytes];
  unsigned char v[kStages][Layout::kBytes];
  float span_out[4 * WarpTile::kOutBlocks][kThreads];  // outputs of the splits before; per thread
  int pages[kPageStages][Layout::kKeys];
  RowSlots rows[16 * kRowTiles];  // looked up for masks only: registers are dearer
  typename WarpTile::Shared tile;
};

struct BlockPlace {
  int64_t b;
  int head, first_row, part;

  __device__ __forceinline__ BlockPlace(const AttentionLaunch& p, int rows_per_block) {
    unsigned i = blockIdx.x;
    head = static_cast<int>(i % p.heads);
    i /= p.heads;
    first_row = static_cast<int>(i % p.row_blocks) * rows_per_block;
    i /= p.row_blocks;
    part = static_cast<int>(i % p.parts);
    b = i / p.parts;
  }
};

// Copies tiles of K and V to their stages. Page ids of tile i come with tile i - (kStages - 1), so
// that no copy waits for the block table. A thread copies one column chunk of every kKeysAtOnce-th
// key.
template <typename T, int D, typename Shared>
struct TileLoader {
  using Layout = TileLayout<T, D>;
  static constexpr int kKeysAtOnce = kThreads / Layout::kChunks;
  const AttentionLaunch& p;
  Shared& shared;
  const int32_t* table;
  const char *k, *v;  // this thread's chunk of slot 0 of page 0
  int first_key, chunk, end;
  bool column_exists;
  AsyncCopies copies;

  __device__ __forceinline__ TileLoader(const AttentionLaunch& p_, Shared& shared_, int64_t b,
                                        int head, int end_)
      : p(p_), shared(shared_), table(p_.a.block_table + b * p_.a.table_stride), end(end_) {
    chunk = threadIdx.x % Layout::kChunks;
    first_key = threadIdx.x / Layout::kChunks;
    const int column = chunk * Layout::kChunkElements;
    column_exists = column < p.a.head_dim;
    const int64_t element = head * p.a.head_dim + (column_exists ? column : 0);
    k = static_cast<const char*>(p.a.k_pages) + element * sizeof(T);
    v = static_cast<const char*>(p.a.v_pages) + element * sizeof(T);
  }

  __device__ __forceinline__ void copy_page_ids(int tile) {
    const int slot = tile * Layout::kKeys + static_cast<int>(threadIdx.x);
    if (threadIdx.x >= Layout::kKeys || slot >= end) return;
    copies.copy4(&shared.pages[tile % kPageStages][threadIdx.x], table + (slot >> p.page_shift));
  }

  // Slots at or behind `end`, pages that do not exist and columns behind head_dim become zeros.
  __device__ __forceinline__ void copy_tile(int tile) {
    if (Layout::kChunks * kKeysAtOnce < kThreads && first_key >= kKeysAtOnce) return;
    const int* pages = shared.pages[tile % kPageStages];
    unsigned char* to_k = shared.k[tile % kStages];
    unsigned char* to_v = shared.v[tile % kStages];
#pragma unroll
    for (int first = 0; first < Layout::kKeys; first += kKeysAtOnce) {
      const int key = first + first_key;
      if (Layout::kKeys % kKeysAtOnce != 0 && key >= Layout::kKeys) break;
      const int slot = tile * Layout::kKeys + key;
      const int page = slot < end ? pages[key] : -1;
      const bool exists = static_cast<unsigned>(page) < p.pages;
      const int row = exists ? (page << p.page_shift) + (slot & p.page_mask) : 0;
      const int64_t from = int64_t{row} * p.row_bytes;
      const int to = Layout::offset(key, chunk);
      copies.copy16(to_k + to, k + from, exists && column_exists);
      copies.copy16(to_v + to, v + from, exists && column_exists);
    }
  }

  __device__ __forceinline__ void start(int first_tile, int end_tile) {
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) {
      if (first_tile + i < end_tile) copy_page_ids(first_tile + i);
    }
    copies.commit();
    copies.template wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) request(first_tile + i, end_tile);
  }

  __device__ __forceinline__ void request(int tile, int end_tile) {
    if (tile < end_tile) copy_tile(tile);
    const int ahead = tile + kStages - 1;
    if (ahead < end_tile) copy_page_ids(ahead);
    copies.commit();
  }

  // Tile `tile` is there for all threads, and its predecessor's stage can be filled anew.
  __device__ __forceinline__ void await() {
    copies.template wait<kStages - 2>();
    __syncthreads();
  }
};

// What a warp's 16 rows see; the lane's are rows g and g + 8 of them.
struct WarpRows {
  int full_begin, full_end;  // slots that all rows see
  int seen_begin, seen_end;  // slots that some row sees

  __device__ __forceinline__ WarpRows(const RowSlots& low, const RowSlots& high) {
    unsigned begin = ~0u, last_begin = 0, dense_end = ~0u, end = 0;
    for (const RowSlots* r : {&low, &high}) {
      if (r->sees_nothing()) continue;
      begin = min(begin, static_cast<unsigned>(r->begin));
      last_begin = max(last_begin, static_cast<unsigned>(r->begin));
      dense_end = min(dense_end, static_cast<unsigned>(r->dense_end));
      end = max(end, static_cast<unsigned>(r->end));
    }
    seen_begin = static_cast<int>(min(__reduce_min_sync(kAllLanes, begin), 0x7fffffffu));
    seen_end = static_cast<int>(__reduce_max_sync(kAllLanes, end));
    full_begin = static_cast<int>(__reduce_max_sync(kAllLanes, last_begin));
    full_end = static_cast<int>(min(__reduce_min_sync(kAllLanes, dense_end), 0x7fffffffu));
  }
  __device__ __forceinline__ bool see_some(int slot, int keys) const {
    return slot < seen_end && slot + keys > seen_begin;
  }
  __device__ __forceinline__ bool see_all(int slot, int keys) const {
    return slot >= full_begin && slot + keys <= full_end;
  }
};

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Scores in powers of two; tanh(x) = 1 - 2 / (e^2x + 1).
template <int kBlocks>
__device__ __forceinline__ void scale_scores(const AttentionLaunch& p, float (&s)[kBlocks][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kBlocks; ++i) s[i / 4][i % 4] *= p.dot_scale;
  if (p.cap == 0.0f) return;
#pragma unroll
  for (int i = 0; i < 4 * kBlocks; ++i) {
    const float e2x = exp2_approx(s[i / 4][i % 4]);
    s[i / 4][i % 4] = p.cap * (1.0f - __fdividef(2.0f, e2x + 1.0f));
  }
}

// One warp's softmax over the tiles of a split, and over the splits of its block.
template <typename T, int D, int kRowTiles>
struct WarpSoftmax {
  using Shared = BlockShared<T, D, kRowTiles>;
  using WarpTile = typename Shared::WarpTile;
  static constexpr int kScoreBlocks = WarpTile::kScoreBlocks, kOutBlocks = WarpTile::kOutBlocks;

  float out[kOutBlocks][4];
  SoftmaxState split[2], span[2];  // of rows g and g + 8; split.sum: this lane's share

  __device__ __forceinline__ void begin_split() {
#pragma unroll
    for (int i = 0; i < kOutBlocks; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i][e] = 0.0f;
    }
    split[0] = split[1] = SoftmaxState{-INFINITY, 0.0f};
  }

  __device__ __forceinline__ void begin_span(Shared& shared) {
#pragma unroll
    for (int i = 0; i < 4 * kOutBlocks; ++i) shared.span_out[i][threadIdx.x] = 0.0f;
    span[0] = span[1] = SoftmaxState{-INFINITY, 0.0f};
  }

  // seen[i]: bit k says that row i sees key k.
  template <bool kMasked>
  __device__ __forceinline__ void add_tile(const AttentionLaunch& p, const WarpTile& tile,
                                           const unsigned char* k, const unsigned char* v,
                                           const uint64_t (&seen)[2]) {
    float s[kScoreBlocks][4];
    tile.scores(s, k);
    scale_scores(p, s);
    const int t = threadIdx.x % 4;
    const uint64_t own[2] = {seen[0] >> 2 * t, seen[1] >> 2 * t};  // keys 8j + 2t at bits 8j
    float top[2] = {split[0].maximum, split[1].maximum};
#pragma unroll
    for (int j = 0; j < kScoreBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (kMasked && !(own[e / 2] >> (8 * j + e % 2) & 1)) s[j][e] = -INFINITY;
        top[e / 2] = fmaxf(top[e / 2], s[j][e]);
      }
    }
    float rescale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      top[i] = quad_max(top[i]);
      rescale[i] = exp2_approx(split[i].maximum - finite_maximum(top[i]));
      split[i] = {top[i], split[i].sum * rescale[i]};
    }
#pragma unroll
    for (int j = 0; j < kScoreBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[j][e] = exp2_approx(s[j][e] - finite_maximum(top[e / 2]));
        split[e / 2].sum += s[j][e];
      }
    }
    if (__any_sync(kAllLanes, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < kOutBlocks; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out[i][e] *= rescale[e / 2];
      }
    }
    uint64_t keep = 0;
    if (kMasked) keep = seen_by_any(seen);
    tile.template accumulate<kMasked>(out, s, v, keep);
  }

  __device__ __forceinline__ void end_split() {
#pragma unroll
    for (int i = 0; i < 2; ++i) split[i].sum = quad_sum(split[i].sum);
  }

  // Puts the split on top of those before.
  __device__ __forceinline__ void merge_split(Shared& shared) {
    MergeScales scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) scales[i] = merge(span[i], split[i]);
#pragma unroll
    for (int i = 0; i < kOutBlocks; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& before = shared.span_out[4 * i + e][threadIdx.x];
        before = merge_output(before, out[i][e], scales[e / 2]);
      }
    }
  }

  __device__ __forceinline__ void end_span(const Shared& shared) {
#pragma unroll
    for (int i = 0; i < 4 * kOutBlocks; ++i) out[i / 4][i % 4] = shared.span_out[i][threadIdx.x];
    split[0] = span[0];
    split[1] = span[1];
  }

 private:
  static __device__ __forceinline__ uint64_t seen_by_any(const uint64_t (&seen)[2]) {
    const uint64_t both = seen[0] | seen[1];
    const unsigned low = __reduce_or_sync(kAllLanes, static_cast<unsigned>(both));
    const unsigned high = __reduce_or_sync(kAllLanes, static_cast<unsigned>(both >> 32));
    return low | static_cast<uint64_t>(high) << 32;
  }
};

}  // namespace inferlab::cuda
