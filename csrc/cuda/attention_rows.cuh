// Which slots a row of paged_tree_attention sees, and how slots are cut into tiles, splits and
// spans. Everything is counted from slot 0, never from what a launch happens to hold, so that a
// row's arithmetic is the same in every batch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "inferlab/attention.h"

namespace inferlab::cuda {

// Softmax state starts anew at each split; splits are merged in order into their span, and spans in
// order into the row. A block takes one split, or one span where there are blocks enough.
constexpr int kSplit = 256;
constexpr int kSpan = 1024;

struct AttentionLaunch {
  AttentionParams a;
  int slots;       // that the block table can name
  int page_shift;  // log2(page_size)
  int page_mask;   // page_size - 1
  unsigned pages;
  int row_bytes;        // of a slot: all KV heads
  int group;            // query heads per KV head
  int rows;             // of one KV head: nodes x group
  int row_tiles;        // of 16 rows each, of a block
  int part;             // slots of a block: kSplit or kSpan
  unsigned heads;       // of K and V
  unsigned row_blocks;  // of one KV head
  unsigned parts;       // of `slots`
  float cap;            // softcap in powers of two; 0: none
  float dot_scale;      // of q . k: to a score in powers of two, or to 2x of cap * tanh(x)
  bool q_pairs;         // q can be read two elements at a time
  // Unnormalised output, and (maximum, sum) of each part of each row [B, N, Hq].
  float* part_out;     // [parts, B * N * Hq, D]
  float2* part_state;  // [parts, B * N * Hq]
};

// Slots [begin, end).
struct SlotRange {
  int begin, end;
};

__device__ __forceinline__ int clamp_int(int64_t x, int low, int high) {
  return x < low ? low : x > high ? high : static_cast<int>(x);
}

struct Sequence {
  int length;  // committed slots
  int nodes;   // rows that count
  int end;     // slots written: committed ones and nodes

  __device__ __forceinline__ Sequence(const AttentionLaunch& p, int64_t b) {
    length = clamp_int(p.a.seq_lens[b], 0, p.slots);
    nodes = p.a.num_nodes == nullptr ? static_cast<int>(p.a.nodes)
                                     : clamp_int(p.a.num_nodes[b], 0, static_cast<int>(p.a.nodes));
    end = clamp_int(length + p.a.node_offset + nodes, 0, p.slots);
  }
};

// The first position that a query at `position` sees.
__device__ __forceinline__ int window_begin(const AttentionLaunch& p, int64_t position) {
  return p.a.window == 0 ? 0 : clamp_int(position + 1 - p.a.window, 0, p.slots);
}

// All that rows of nodes [first, last] can see. A tree's nodes may stand as high as its root.
__device__ __forceinline__ SlotRange slots_of_nodes(const AttentionLaunch& p, const Sequence& s,
                                                    int first, int last) {
  if (p.a.ancestors != nullptr) return {window_begin(p, s.length), s.end};
  const int64_t chain = s.length + p.a.node_offset;
  return {window_begin(p, chain + first), clamp_int(chain + last + 1, 0, s.end)};
}

// One row: it sees slots [begin, dense_end), and its ancestors up to `end`.
struct RowSlots {
  int begin, dense_end, end;
  const uint64_t* ancestors;  // [W] or null

  __device__ __forceinline__ RowSlots(const AttentionLaunch& p, const Sequence& s, int64_t b,
                                      int node) {
    begin = dense_end = end = 0;  // padding sees nothing
    ancestors = nullptr;
    if (node >= s.nodes) return;
    if (p.a.ancestors == nullptr) {
      const int64_t position = s.length + p.a.node_offset + node;
      begin = window_begin(p, position);
      dense_end = end = clamp_int(position + 1, 0, s.end);
      return;
    }
    const uint64_t* words = p.a.ancestors + (b * p.a.nodes + node) * p.a.words;
    int path = 0;
#pragma unroll 1
    for (int64_t w = 0; w < p.a.words; ++w) path += __popcll(words[w]);
    if (path == 0) return;  // a padding node
    ancestors = words;
    begin = window_begin(p, int64_t{s.length} + path - 1);
    dense_end = s.length;
    end = s.end;
  }

  __device__ __forceinline__ bool sees_nothing() const { return end == 0; }
};

// Bits [begin, end) of 64, where they lie inside.
__device__ __forceinline__ uint64_t bit_range(int begin, int end) {
  const int b = begin < 0 ? 0 : begin;
  const int e = end > 64 ? 64 : end;
  if (b >= e) return 0;
  return (~uint64_t{0} >> (64 - (e - b))) << b;
}

__device__ __forceinline__ uint64_t word_or_zero(const uint64_t* words, int64_t count, int64_t w) {
  return w >= 0 && w < count ? words[w] : 0;
}

// Bit i: the row sees slot `slot + i`. A slot's node is `slot - length`.
__device__ __forceinline__ uint64_t visible_slots(const RowSlots& row, int64_t words, int length,
                                                  int slot) {
  uint64_t seen = bit_range(row.begin - slot, row.dense_end - slot);
  if (row.ancestors == nullptr || slot + 64 <= length) return seen;
  const int node = slot - length;
  const int64_t word = node >= 0 ? node / 64 : -1;
  const int shift = node & 63;
  uint64_t path = word_or_zero(row.ancestors, words, word) >> shift;
  if (shift != 0) path |= word_or_zero(row.ancestors, words, word + 1) << (64 - shift);
  path &= bit_range(length - slot, row.end - slot);
  if (row.begin > length) {  // the window ends inside the path: rank i stands at length + i
    int rank = 0;
#pragma unroll 1
    for (int64_t w = 0; w < word; ++w) rank += __popcll(row.ancestors[w]);
    if (node > 0 && shift != 0) {
      rank += __popcll(word_or_zero(row.ancestors, words, word) & bit_range(0, shift));
    }
#pragma unroll 1
    for (; rank < row.begin - length && path != 0; ++rank) path &= path - 1;
  }
  return seen | path;
}

// Softmax over some slots: scores' maximum (in powers of two), sum of exp2(score - maximum); the
// output that belongs to them is not divided by `sum` yet.
struct SoftmaxState {
  float maximum, sum;
};

// What was gathered before and what comes on top are scaled to one maximum.
struct MergeScales {
  float before, added;
};

__device__ __forceinline__ float finite_maximum(float m) {
  return m == -INFINITY ? 0.0f : m;  // nothing seen yet: exp2(-inf - 0) = 0
}

__device__ __forceinline__ MergeScales merge(SoftmaxState& state, const SoftmaxState& more) {
  const float maximum = fmaxf(state.maximum, more.maximum);
  const float base = finite_maximum(maximum);
  const MergeScales scales{exp2f(state.maximum - base), exp2f(more.maximum - base)};
  state.sum = __fmaf_rn(state.sum, scales.before, __fmul_rn(more.sum, scales.added));
  state.maximum = maximum;
  return scales;
}

__device__ __forceinline__ float merge_output(float before, float added, const MergeScales& s) {
  return __fmaf_rn(before, s.before, __fmul_rn(added, s.added));
}

__device__ __forceinline__ float reciprocal_sum(const SoftmaxState& s) {
  return s.sum == 0.0f ? 0.0f : 1.0f / s.sum;  // rows that see nothing give zeros
}

}  // namespace inferlab::cuda
