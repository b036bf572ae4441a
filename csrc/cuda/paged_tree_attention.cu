// paged_tree_attention: softmax(cap(scale q k^T)) v over paged K/V, flash-decoding style.
//
// The rows of a KV head are its nodes x its query heads, so that all of them share its loads. A
// block takes 16 * kRowTiles rows of one KV head and one part of the slots, and walks over tiles of
// 16 to 64 keys (16 KB of K and V) with a running softmax in fp32. Its 4 warps are kRowTiles tiles
// of 16 rows x kColumnWarps shares of the output's columns. Warps of one row tile compute the same
// scores: that costs tensor time that a memory-bound kernel has to spare, and saves every exchange
// between warps; and a row's arithmetic is the same in all shapes of blocks.
//
// Tiles that all rows of a warp see whole run unmasked; only tails (and edges of windows) read
// ancestor bits. Slots are cut into splits of 256, splits are grouped into spans of 1024. A block
// takes one split where blocks are few, one span otherwise; attention_merge_kernel puts the parts
// together, in the same order and with the same operations as a block does for the splits of its
// span (attention_rows.cuh). Rows that lie in one part are written at once.
//
// Grid: blockIdx.x = ((b * parts + part) * row_blocks + row block) * Hkv + KV head: heads that are
// neighbours in memory run together, blocks of one head and part share it in the L2 cache. `parts`
// is what the block table could hold; lengths are on the device, parts behind them end at once.
//
// Bytes: B * L * 2 * Hkv * D * s read once (N <= 64 / group), N * Hq * D * 2 * s for q and out, and
// N * Hq * (D + 2) * 8 per part for the parts (3 % of K/V at 16 rows a span, 13 % at 64). Bytes in
// flight: an SM of an H200 must keep 4.3 TB/s * 0.8 us / 132 = 26 KB; a block keeps 3 of its 4
// stages = 48 KB of copies under way, and 3 blocks (2 with 64 rows) fit an SM. Of the 850 cycles
// that memory takes for a tile of 16 KB, D = 128, 64 rows take 4 * 64 mma on 4 tensor units (~ 400)
// and 64 KB of shared memory reads (512).
#include "attention_rows.cuh"
#include "attention_tile.cuh"
#include "cp_async.cuh"
#include "inferlab/attention.h"
#include "launch.cuh"

namespace inferlab::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 4;
constexpr int kPageStages = 2 * kStages;  // page ids come kStages - 1 tiles before their tile
constexpr size_t kMaxShared = 99 * 1024;  // of a block on sm_86, 89 and 120
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504f;

// ---- the block's work ---------------------------------------------------------------------------

template <typename T, int D, int kRowTiles>
struct alignas(128) BlockShared {
  using WarpTile = Tile<T, D, kWarps / kRowTiles>;
  using Layout = TileLayout<T, D>;
  unsigned char k[kStages][Layout::kBytes];
  unsigned char v[kStages][Layout::kBytes];
  float span_out[4 * WarpTile::kOutBlocks][kThreads];  // outputs of the splits before; per thread
  int pages[kPageStages][Layout::kKeys];
  Row rows[16 * kRowTiles];  // looked up for masks only: registers are dearer
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

  __device__ __forceinline__ WarpRows(const Row& low, const Row& high) {
    unsigned begin = ~0u, last_begin = 0, dense_end = ~0u, end = 0;
    for (const Row* r : {&low, &high}) {
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

// Two neighbouring elements.
template <typename T>
__device__ __forceinline__ void store_pair(T* to, float a, float b) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float2*>(to) = make_float2(a, b);
  } else {
    *reinterpret_cast<uint32_t*>(to) = pack<T>(a, b);
  }
}

// ---- kernels ------------------------------------------------------------------------------------

template <typename T, int D, int kRowTiles>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && D <= 128 && kRowTiles == 1 ? 3 : 2)
    attention_kernel(AttentionLaunch p) {
  using Shared = BlockShared<T, D, kRowTiles>;
  using Layout = TileLayout<T, D>;
  constexpr int kKeys = Layout::kKeys, kRows = 16 * kRowTiles;
  constexpr int kColumnWarps = kWarps / kRowTiles;
  static_assert(kSplit % kKeys == 0 && kSpan % kSplit == 0);
  static_assert(sizeof(Shared) <= kMaxShared);

  auto& shared = shared_memory<Shared>();
  const BlockPlace place(p, kRows);
  const Sequence sequence(p, place.b);
  const int end_row = min(place.first_row + kRows, sequence.nodes * p.group);
  T* const out = static_cast<T*>(p.a.out);
  const auto out_row = [&](int row) {  // in [B, N, Hq]
    return (place.b * p.a.nodes + row / p.group) * p.a.q_heads + place.head * p.group +
           row % p.group;
  };

  if (place.part == 0) {  // rows of nodes that do not count
    const int chunks = static_cast<int>(p.a.head_dim) / Layout::kChunkElements;
    const int first = max(place.first_row, sequence.nodes * p.group);
    const int padding = min(place.first_row + kRows, p.rows) - first;
#pragma unroll 1
    for (int i = threadIdx.x; i < padding * chunks; i += kThreads) {
      T* to = out + out_row(first + i / chunks) * p.a.head_dim;
      reinterpret_cast<uint4*>(to)[i % chunks] = make_uint4(0, 0, 0, 0);
    }
  }
  if (place.first_row >= end_row) return;

  SlotRange range = slots_of_nodes(p, sequence, place.first_row / p.group, (end_row - 1) / p.group);
  range.begin = max(range.begin, place.part * p.part);
  range.end = min(range.end, (place.part + 1) * p.part);
  if (range.begin >= range.end) return;
  const int first_tile = range.begin / kKeys, end_tile = (range.end + kKeys - 1) / kKeys;
  const bool several_splits = range.begin / kSplit != (range.end - 1) / kSplit;

  TileLoader<T, D, Shared> loader(p, shared, place.b, place.head, sequence.end);
  loader.start(first_tile, end_tile);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_column = warp % kColumnWarps;
  const int warp_row = place.first_row + 16 * (warp / kColumnWarps);
  const int row[2] = {warp_row + lane / 4, warp_row + lane / 4 + 8};
  const Row low(p, sequence, place.b, row[0] / p.group);
  const Row high(p, sequence, place.b, row[1] / p.group);
  const WarpRows rows(low, high);
  Row* const own_rows = &shared.rows[warp_row - place.first_row + lane / 4];
  if (lane % 4 == 0 && warp_column == 0) {
    own_rows[0] = low;
    own_rows[8] = high;
  }
  typename Shared::WarpTile tile(shared.tile, lane, warp_column);
  QueryRows<T> queries{{nullptr, nullptr}, static_cast<int>(p.a.head_dim), p.q_pairs};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (row[i] >= end_row) continue;
    queries.row[i] = static_cast<const T*>(p.a.q) + place.b * p.a.q_stride[0] +
                     row[i] / p.group * p.a.q_stride[1] +
                     (place.head * p.group + row[i] % p.group) * p.a.q_stride[2];
  }
  tile.load_queries(queries);

  WarpSoftmax<T, D, kRowTiles> softmax;
  softmax.begin_split();
  softmax.begin_span(shared);
#pragma unroll 1
  for (int i = first_tile; i < end_tile; ++i) {
    loader.await();
    loader.request(i + kStages - 1, end_tile);
    const int slot = i * kKeys, stage = i % kStages;
    if (rows.see_some(slot, kKeys)) {
      uint64_t seen[2] = {0, 0};
      if (rows.see_all(slot, kKeys)) {
        softmax.template add_tile<false>(p, tile, shared.k[stage], shared.v[stage], seen);
      } else {
        seen[0] = visible_slots(own_rows[0], p.a.words, sequence.length, slot);
        seen[1] = visible_slots(own_rows[8], p.a.words, sequence.length, slot);
        softmax.template add_tile<true>(p, tile, shared.k[stage], shared.v[stage], seen);
      }
    }
    const bool split_ends = (slot + kKeys) % kSplit == 0 || i + 1 == end_tile;
    if (split_ends) {
      softmax.end_split();
      if (several_splits) {
        softmax.merge_split(shared);
        softmax.begin_split();
      }
    }
  }
  if (several_splits) softmax.end_span(shared);

  for (int r = 0; r < 2; ++r) {
    if (row[r] >= end_row) continue;
    const int node = row[r] / p.group;
    const SlotRange slots = slots_of_nodes(p, sequence, node, node);
    const int first_part = slots.begin / p.part, last_part = (slots.end - 1) / p.part;
    if (place.part < first_part || place.part > last_part) continue;
    const bool whole = first_part == last_part;
    const bool padding = own_rows[8 * r].sees_nothing();
    const SoftmaxState state = padding ? SoftmaxState{-INFINITY, 0.0f} : softmax.split[r];
    const float scale = whole ? reciprocal_sum(state) : 1.0f;
    const int64_t index = out_row(row[r]);
    const int64_t part_row = place.part * p.a.batch * p.a.nodes * p.a.q_heads + index;
    if (!whole && warp_column == 0 && lane % 4 == 0) {
      p.part_state[part_row] = make_float2(state.maximum, state.sum);
    }
#pragma unroll
    for (int i = 0; i < softmax.kOutBlocks; ++i) {
      const int block = Shared::WarpTile::Columns::block(warp_column, i / 2);
      const int column = 16 * block + 8 * (i % 2) + 2 * (lane % 4);
      if (column >= p.a.head_dim) continue;
      const float a = padding ? 0.0f : softmax.out[i][2 * r] * scale;
      const float b = padding ? 0.0f : softmax.out[i][2 * r + 1] * scale;
      if (whole) {
        store_pair(out + index * p.a.head_dim + column, a, b);
      } else {
        store_pair(p.part_out + part_row * p.a.head_dim + column, a, b);
      }
    }
  }
}

// A thread merges the parts of 4 columns of a row: splits into their span, spans into the row.
constexpr int kAtOnce = 4;  // parts whose loads are under way together

template <typename T>
__global__ void __launch_bounds__(kThreads) attention_merge_kernel(AttentionLaunch p) {
  const int64_t rows = p.a.batch * p.a.nodes * p.a.q_heads;
  const int quads = static_cast<int>(p.a.head_dim / 4);
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = thread / quads;
  const int column = 4 * static_cast<int>(thread % quads);
  if (row >= rows) return;
  const int64_t b = row / p.a.q_heads / p.a.nodes;
  const int node = static_cast<int>(row / p.a.q_heads % p.a.nodes);
  const Sequence sequence(p, b);
  if (node >= sequence.nodes) return;
  const SlotRange slots = slots_of_nodes(p, sequence, node, node);
  const int first_part = slots.begin / p.part, last_part = (slots.end - 1) / p.part;
  if (first_part >= last_part) return;  // written by its block

  const int parts_per_span = kSpan / p.part;
  SoftmaxState span{-INFINITY, 0.0f}, all{-INFINITY, 0.0f};
  float4 span_out = make_float4(0, 0, 0, 0), all_out = make_float4(0, 0, 0, 0);
  const auto merge_columns = [](float4& before, const float4& added, const MergeScales& s) {
    before = make_float4(merge_output(before.x, added.x, s), merge_output(before.y, added.y, s),
                         merge_output(before.z, added.z, s), merge_output(before.w, added.w, s));
  };
  for (int base = first_part; base <= last_part; base += kAtOnce) {
    float2 states[kAtOnce];
    float4 outs[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t part_row = min(base + i, last_part) * rows + row;
      states[i] = p.part_state[part_row];
      outs[i] = *reinterpret_cast<const float4*>(p.part_out + part_row * p.a.head_dim + column);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int part = base + i;
      if (part > last_part) break;
      merge_columns(span_out, outs[i], merge(span, {states[i].x, states[i].y}));
      if ((part + 1) % parts_per_span != 0 && part != last_part) continue;
      merge_columns(all_out, span_out, merge(all, span));
      span = {-INFINITY, 0.0f};
      span_out = make_float4(0, 0, 0, 0);
    }
  }
  const float scale = reciprocal_sum(all);
  T* to = static_cast<T*>(p.a.out) + row * p.a.head_dim + column;
  store_pair(to, all_out.x * scale, all_out.y * scale);
  store_pair(to + 2, all_out.z * scale, all_out.w * scale);
}

// ---- launcher -----------------------------------------------------------------------------------

constexpr int64_t kMaxGrid = 0x7fffffff;
constexpr int64_t kMaxSlots = int64_t{1} << 30;      // slots of a sequence: their numbers are ints
constexpr int64_t kMaxPoolSlots = int64_t{1} << 31;  // and so are those of all pages

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Head dims without a kernel of their own run in the next larger one; its last columns are zeros.
int compiled_dim(int64_t dim) {
  for (const int d : {64, 80, 96, 128}) {
    if (dim <= d) return d;
  }
  return 256;
}

int row_tiles(const AttentionParams& a) {
  const int64_t rows = a.nodes * (a.q_heads / a.kv_heads);
  if (rows <= 16 || a.dtype == DType::kF32) return 1;
  return compiled_dim(a.head_dim) == 256 ? 2 : 4;
}

AttentionLaunch plan(const AttentionParams& a, void* workspace) {
  AttentionLaunch p{};
  p.a = a;
  const int64_t slots = a.max_pages * a.page_size;
  p.slots = static_cast<int>(slots < kMaxSlots ? slots : kMaxSlots);
  while (int64_t{1} << p.page_shift < a.page_size) ++p.page_shift;
  p.page_mask = static_cast<int>(a.page_size - 1);
  p.pages = static_cast<unsigned>(a.pages);
  p.row_bytes = static_cast<int>(a.kv_heads * a.head_dim * dtype_size(a.dtype));
  p.group = static_cast<int>(a.q_heads / a.kv_heads);
  p.heads = static_cast<unsigned>(a.kv_heads);
  p.rows = static_cast<int>(a.nodes) * p.group;
  p.row_blocks = static_cast<unsigned>(ceil_div(p.rows, 16 * row_tiles(a)));
  const int64_t blocks_per_part = a.batch * a.kv_heads * p.row_blocks;
  p.part = blocks_per_part >= multiprocessors() ? kSpan : kSplit;
  p.parts = static_cast<unsigned>(p.slots <= p.part ? 1 : ceil_div(p.slots, p.part));
  bool even = reinterpret_cast<uintptr_t>(a.q) % 4 == 0;
  for (const int64_t stride : a.q_stride) even &= stride % 2 == 0;
  p.q_pairs = even;
  p.cap = a.softcap * kLog2E;
  p.dot_scale = a.softcap > 0.0f ? a.scale / a.softcap * (2.0f * kLog2E) : a.scale * kLog2E;
  const int64_t part_rows = p.parts * a.batch * a.nodes * a.q_heads;
  p.part_out = static_cast<float*>(workspace);
  p.part_state = reinterpret_cast<float2*>(p.part_out + part_rows * a.head_dim);
  return p;
}

template <typename T, int D, int kRowTiles>
Status launch_attention(const AttentionLaunch& p, void* stream) {
  const int64_t blocks = p.a.batch * p.parts * p.row_blocks * p.a.kv_heads;
  if (blocks > kMaxGrid) return Status::kBadArgument;
  return launch(attention_kernel<T, D, kRowTiles>, dim3(static_cast<unsigned>(blocks)),
                dim3(kThreads), sizeof(BlockShared<T, D, kRowTiles>), stream, p);
}

template <typename T, int D>
Status launch_rows(const AttentionLaunch& p, void* stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (row_tiles(p.a) != 1) return launch_attention<T, D, D == 256 ? 2 : 4>(p, stream);
  }
  return launch_attention<T, D, 1>(p, stream);
}

template <typename T>
Status launch_dim(const AttentionLaunch& p, void* stream) {
  switch (compiled_dim(p.a.head_dim)) {
    case 64:
      return launch_rows<T, 64>(p, stream);
    case 80:
      return launch_rows<T, 80>(p, stream);
    case 96:
      return launch_rows<T, 96>(p, stream);
    case 128:
      return launch_rows<T, 128>(p, stream);
    default:
      return launch_rows<T, 256>(p, stream);
  }
}

template <typename T>
Status launch_both(const AttentionLaunch& p, void* stream) {
  const Status status = launch_dim<T>(p, stream);
  if (status != Status::kOk || p.parts == 1) return status;
  const int64_t threads = p.a.batch * p.a.nodes * p.a.q_heads * (p.a.head_dim / 4);
  return launch(attention_merge_kernel<T>, dim3(static_cast<unsigned>(ceil_div(threads, kThreads))),
                dim3(kThreads), 0, stream, p);
}

}  // namespace

int64_t attention_workspace_bytes(const AttentionParams& a) {
  const AttentionLaunch p = plan(a, nullptr);
  if (p.parts == 1) return 0;
  return p.parts * a.batch * a.nodes * a.q_heads * (a.head_dim + 2) * int64_t{sizeof(float)};
}

Status paged_tree_attention(const AttentionParams& a, void* workspace, void* stream) {
  if (a.batch == 0 || a.nodes == 0) return Status::kOk;
  if (a.pages * a.page_size > kMaxPoolSlots) return Status::kBadArgument;
  const AttentionLaunch p = plan(a, workspace);
  switch (a.dtype) {
    case DType::kF32:
      return launch_both<float>(p, stream);
    case DType::kF16:
      return launch_both<f16>(p, stream);
    case DType::kBF16:
      return launch_both<bf16>(p, stream);
  }
  return Status::kBadArgument;
}

}  // namespace inferlab::cuda
