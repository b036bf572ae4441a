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
// ancestor bits. Values of slots that no row of the warp sees are taken as 0; a NaN in one that
// some row sees may spread to the warp's other rows. Slots are cut into splits of 256, splits are
// grouped into spans of 1024. A block takes one split where blocks are few, one span otherwise;
// attention_merge_kernel puts the parts together, in the same order and with the same operations as
// a block does for the splits of its span (attention_rows.cuh). Rows that lie in one part are
// written at once.
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
#include "attention_block.cuh"
#include "inferlab/attention.h"
#include "launch.cuh"

namespace inferlab::cuda {
namespace {

constexpr float kLog2E = 1.44269504f;

// Two neighbouring elements.
template <typename T>
__device__ __forceinline__ void store_pair(T* to, float a, float b) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float2*>(to) = make_float2(a, b);
  } else {
    *reinterpret_cast<uint32_t*>(to) = pack_pair_but_nan<T>(a, b);
  }
}

// ---- kernels ------------------------------------------------------------------------------------

template <typename T, int D, int kRowTiles>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 && D <= 128 && kRowTiles == 1 ? 3 : 2)
    attention_kernel(AttentionLaunch p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
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
  const RowSlots low(p, sequence, place.b, row[0] / p.group);
  const RowSlots high(p, sequence, place.b, row[1] / p.group);
  const WarpRows rows(low, high);
  RowSlots* const own_rows = &shared.rows[warp_row - place.first_row + lane / 4];
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
        __syncwarp();  // lanes took different ways; ldmatrix and mma want them together
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
  let_next_kernel_start();
  wait_for_earlier_kernels();
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

// Larger blocks share the loads of K and V; where they are too few to occupy the device, smaller
// ones are quicker.
int row_tiles(const AttentionParams& a, int64_t parts) {
  const int64_t rows = a.nodes * (a.q_heads / a.kv_heads);
  if (rows <= 16 || a.dtype == DType::kF32) return 1;
  const int tiles = compiled_dim(a.head_dim) == 256 ? 2 : 4;
  const int64_t blocks = a.batch * a.kv_heads * parts * ceil_div(rows, 16 * tiles);
  return blocks < multiprocessors() ? 1 : tiles;
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
  const int64_t splits = p.slots <= kSplit ? 1 : ceil_div(p.slots, kSplit);
  p.row_tiles = row_tiles(a, splits);
  p.row_blocks = static_cast<unsigned>(ceil_div(p.rows, 16 * p.row_tiles));
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
                dim3(kThreads), sizeof(BlockShared<T, D, kRowTiles>), stream, p,
                Blocks::kIndependent, Start::kEarly);
}

template <typename T, int D>
Status launch_rows(const AttentionLaunch& p, void* stream) {
  if constexpr (!std::is_same_v<T, float>) {
    if (p.row_tiles != 1) return launch_attention<T, D, D == 256 ? 2 : 4>(p, stream);
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
                dim3(kThreads), 0, stream, p, Blocks::kIndependent, Start::kEarly);
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
