// paged_tree_attention: softmax(cap(q k^T * scale)) v of tree nodes over the paged KV cache; what a
// row sees is in inferlab/attention.h.
//
// A row is one query head of one node. A threadgroup takes kRows rows of one KV head, heads of a
// node first, so that the heads which share K/V and neighbouring nodes share its loads; grid [row
// tiles, KV heads, batch]. Keys go by tiles of 32 slots, one per lane: tile t belongs to simdgroup
// t % kSimds, which runs an online softmax (Milakov & Gimelshein, 2018) over its own tiles for all
// rows, without barriers; the simdgroups' results are merged at the end, as in flash-decoding (Dao
// et al., 2023). Tiles lie where they lie whatever else is in the batch, and so a row's bits do not
// depend on it. K is read by lane = key, V by lane = channel.
//
// Bytes: B * L * 2 * Hkv * D * s, times the row tiles of a KV head (later ones hit the cache).
#include "element.h"
#include "group.h"
#include "inferlab/attention.h"
#include "pages.h"

constant constexpr uint kThreads = kMetalThreads;
constant constexpr uint kSimds = kThreads / kSimd;
constant constexpr uint kRows = kMetalAttentionRows;
constant constexpr uint kChunks = INFERLAB_HEAD_CHUNKS;  // head_dim <= kSimd * kChunks
constant constexpr uint kMaxDim = kSimd * kChunks;

struct AttentionShared {
  float q[kRows][kMaxDim];
  float acc[kSimds][kMaxDim];
  float m[kSimds][kRows], l[kSimds][kRows];
  uint seen[kSimds][kRows];
  long first[kRows];  // the row sees no position before it
  long limit[kRows];  // nor any slot from here on; 0: a padding row
};

inline long popcount64(ulong x) { return popcount(uint(x)) + popcount(uint(x >> 32)); }

// Bits of an ancestor row below bit j.
inline long rank_of(device const ulong* bits, long j) {
  long rank = popcount64(bits[j / 64] & ((1UL << (j % 64)) - 1));
  for (long w = 0; w < j / 64; ++w) rank += popcount64(bits[w]);
  return rank;
}

// Eight elements from a 16-byte boundary.
inline void load8(device const float* from, thread float* to) {
  for (uint i = 0; i < 2; ++i) {
    const float4 x = reinterpret_cast<device const float4*>(from)[i];
    to[4 * i] = x.x;
    to[4 * i + 1] = x.y;
    to[4 * i + 2] = x.z;
    to[4 * i + 3] = x.w;
  }
}
template <typename T>
inline void load8(device const T* from, thread float* to) {
  const uint4 x = *reinterpret_cast<device const uint4*>(from);
  const uint pairs[4] = {x.x, x.y, x.z, x.w};
  for (uint i = 0; i < 4; ++i) {
    to[2 * i] = to_float(as_type<T>(ushort(pairs[i])));
    to[2 * i + 1] = to_float(as_type<T>(ushort(pairs[i] >> 16)));
  }
}

inline float exp_below(float x, float top) {
  return precise::exp(x - (top == -INFINITY ? 0.0f : top));
}

[[max_total_threads_per_threadgroup(kThreads)]]
kernel void paged_tree_attention(
    device const Element* q [[buffer(0)]], device const Element* k_pages [[buffer(1)]],
    device const Element* v_pages [[buffer(2)]], device const int* block_table [[buffer(3)]],
    device const int* seq_lens [[buffer(4)]], device const ulong* ancestors [[buffer(5)]],
    device const int* num_nodes [[buffer(6)]], device Element* out [[buffer(7)]],
    constant AttentionParams& p [[buffer(8)]], uint3 group [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]]) {
  INFERLAB_SHARED(AttentionShared, shared);
  const uint lane = tid % kSimd, simd = tid / kSimd;
  const long b = group.z, kv_head = group.y, heads = p.q_heads / p.kv_heads;
  const long first_row = long(group.x) * kRows, all_rows = p.nodes * heads;
  const uint rows = all_rows - first_row < kRows ? uint(all_rows - first_row) : kRows;
  const long length = seq_lens[b];
  const long count = p.num_nodes != 0 && num_nodes[b] < p.nodes ? long(num_nodes[b]) : p.nodes;
  const long capacity = p.max_pages * p.page_size;

  // ---- the rows: queries, and what each may see
  for (uint i = tid; i < rows * p.head_dim; i += kThreads) {
    const uint r = i / uint(p.head_dim), d = i % uint(p.head_dim);
    const long n = (first_row + r) / heads, head = kv_head * heads + (first_row + r) % heads;
    shared.q[r][d] = to_float(q[b * p.q_stride[0] + n * p.q_stride[1] + head * p.q_stride[2] + d]);
  }
  if (tid < rows) {
    const long n = (first_row + tid) / heads;
    long position = length + p.node_offset + n, limit = position + 1;
    if (p.words > 0) {
      device const ulong* bits = ancestors + (b * p.nodes + n) * p.words;
      long path = 0;
      for (long w = 0; w < p.words; ++w) path += popcount64(bits[w]);
      position = length + path - 1;
      limit = path > 0 ? length + p.node_offset + count : 0;
    }
    if (n >= count) limit = 0;
    shared.limit[tid] = limit < capacity ? limit : capacity;
    shared.first[tid] = p.window > 0 && position >= p.window ? position - p.window + 1 : 0;
  }
  group_barrier();
  long begin = capacity, end = 0;
  for (uint r = 0; r < rows; ++r) {
    if (shared.limit[r] == 0) continue;
    begin = shared.first[r] < begin ? shared.first[r] : begin;
    end = shared.limit[r] > end ? shared.limit[r] : end;
  }

  // ---- this simdgroup's tiles
  float acc[kRows][kChunks], m[kRows], l[kRows];
  uint seen = 0;  // bit r: row r saw a key
  for (uint r = 0; r < kRows; ++r) {
    m[r] = -INFINITY;
    l[r] = 0.0f;
    for (uint c = 0; c < kChunks; ++c) acc[r][c] = 0.0f;
  }
  const long row_size = p.kv_heads * p.head_dim;
  k_pages += kv_head * p.head_dim;
  v_pages += kv_head * p.head_dim;
  long tile = begin / kSimd;
  tile += (simd + kSimds - uint(tile % kSimds)) % kSimds;
  for (; tile * kSimd < end; tile += kSimds) {
    const long slot = tile * kSimd + lane;
    const long row = slot < end ? row_of_slot(block_table, p, b, slot) : -1;
    float s[kRows];
    for (uint r = 0; r < kRows; ++r) s[r] = 0.0f;
    if (row >= 0) {
      device const Element* key = k_pages + row * row_size;
      for (uint d = 0; d < uint(p.head_dim); d += 8) {
        float x[8];
        load8(key + d, x);
        for (uint r = 0; r < kRows; ++r) {
          if (r >= rows) break;
          for (uint i = 0; i < 8; ++i) s[r] = fma(shared.q[r][d + i], x[i], s[r]);
        }
      }
    }
    float weight[kRows];
    uint used = 0;  // bit r: row r sees a key of this tile
    for (uint r = 0; r < kRows; ++r) {
      weight[r] = 0.0f;
      if (r >= rows) break;
      bool visible = row >= 0 && slot < shared.limit[r];
      if (p.words == 0 || slot < length) {
        visible = visible && slot >= shared.first[r];
      } else if (visible) {
        const long j = slot - length;
        device const ulong* bits = ancestors + (b * p.nodes + (first_row + r) / heads) * p.words;
        visible = j < 64 * p.words && (bits[j / 64] >> (j % 64) & 1) != 0;
        if (visible && p.window > 0) visible = length + rank_of(bits, j) >= shared.first[r];
      }
      if (!simd_any(visible)) continue;
      used |= 1u << r;
      float x = s[r] * p.scale;
      if (p.softcap > 0.0f) x = p.softcap * precise::tanh(x / p.softcap);
      const float top = max(m[r], simd_reduce<Max>(visible ? x : -INFINITY));
      const float keep = exp_below(m[r], top);
      weight[r] = visible ? exp_below(x, top) : 0.0f;
      m[r] = top;
      l[r] = fma(l[r], keep, simd_reduce<Add>(weight[r]));
      for (uint c = 0; c < kChunks; ++c) acc[r][c] *= keep;
    }
    if (used == 0) continue;
    seen |= used;
    for (ushort key = 0; key < kSimd; ++key) {
      const long key_row = long(shuffle(ulong(row), key));
      if (key_row < 0) continue;
      float v[kChunks];
      for (uint c = 0; c < kChunks; ++c) {
        const uint d = lane + kSimd * c;
        v[c] = d < uint(p.head_dim) ? to_float(v_pages[key_row * row_size + d]) : 0.0f;
      }
      for (uint r = 0; r < kRows; ++r) {
        if ((used >> r & 1) == 0) continue;
        const float w = simd_shuffle(weight[r], key);
        if (w == 0.0f) continue;  // V of what the row does not see may be NaN
        for (uint c = 0; c < kChunks; ++c) acc[r][c] = fma(w, v[c], acc[r][c]);
      }
    }
  }

  // ---- merge: M = max m, out = sum(acc e^(m - M)) / sum(l e^(m - M))
  for (uint r = 0; r < kRows; ++r) {
    if (lane == 0) {
      shared.m[simd][r] = m[r];
      shared.l[simd][r] = l[r];
      shared.seen[simd][r] = seen >> r & 1;
    }
  }
  for (uint r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    for (uint c = 0; c < kChunks; ++c) shared.acc[simd][lane + kSimd * c] = acc[r][c];
    group_barrier();
    if (tid < uint(p.head_dim)) {
      float top = -INFINITY, sum = 0.0f, value = 0.0f;
      uint any = 0;
      for (uint i = 0; i < kSimds; ++i) {
        top = max(top, shared.m[i][r]);
        any |= shared.seen[i][r];
      }
      for (uint i = 0; i < kSimds; ++i) {
        if (shared.seen[i][r] == 0) continue;
        const float gain = exp_below(shared.m[i][r], top);
        sum = fma(shared.l[i][r], gain, sum);
        value = fma(shared.acc[i][tid], gain, value);
      }
      const long n = (first_row + r) / heads, head = kv_head * heads + (first_row + r) % heads;
      out[((b * p.nodes + n) * p.q_heads + head) * p.head_dim + tid] =
          to_element(any != 0 ? value / sum : 0.0f);
    }
    group_barrier();
  }
}
