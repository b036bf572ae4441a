// The unit of attention work between csrc/cpu/attention.cpp (who does what) and the kernels (how).
#pragma once

#include <algorithm>

#include "inferlab/attention.h"

namespace inferlab::cpu {

// Softmax statistics are taken per chunk of positions, chunks are merged in order into a split, and
// splits in order into the row. Both sizes are fixed and counted from position 0, so that a row's
// arithmetic is the same whoever does it.
constexpr int64_t kChunk = 256;
constexpr int64_t kSplit = 1024;
constexpr int64_t kMaxLanes = 16;
constexpr int64_t kTile =
    64;  // keys, at most, that all rows of a head pass over while they are in L1

constexpr int64_t kAmxChannels = 32;  // AMX takes head dimensions that are a multiple of this

// [begin, end) of positions, or of places in a chunk.
struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

inline Range intersect(Range a, Range b) {
  return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
}

// Nodes [node_begin, node_end) x the query heads of KV heads [head_begin, head_end), over splits
// [split_begin, split_end). Rows are ordered by KV head, node, query head.
struct AttentionTask {
  int64_t b;
  int64_t head_begin, head_end;
  int64_t node_begin, node_end;
  int64_t split_begin, split_end;
  int64_t q_begin;  // its sequence's node 0 in q, in elements
  int64_t out_row;  // and in out, in rows of all heads
  // attention_scratch_floats, 64-byte aligned
  float* scratch;
  // Null: finish the rows. Otherwise attention_state_floats for each split, counted from split 0.
  float* partials;
};

inline int64_t padded(int64_t floats) { return (floats + kMaxLanes - 1) & ~(kMaxLanes - 1); }

// m[rows], l[rows], acc[rows][padded(head_dim)]
inline int64_t attention_state_floats(int64_t rows, int64_t head_dim) {
  return padded(2 * rows) + rows * padded(head_dim);
}

// Offsets of a chunk's keys, and the slack that is read: by score tiles, and by asking for the tile
// after the last.
constexpr int64_t kListLength = kChunk + kTile + kMaxLanes;

// Ancestors of one node that fall into a chunk, and the slack that score tiles read.
inline int64_t own_list_length(int64_t words) {
  return (64 * words < kChunk ? 64 * words : kChunk) + kMaxLanes;
}

// What AMX reads: a tile of bf16 keys or values laid out, and q as bf16 in blocks of 4 or 16 rows.
inline int64_t tile_products_floats(int64_t heads, int64_t rows, int64_t head_dim) {
  const int64_t block_rows = rows <= 4 ? 4 : (rows + 15) / 16 * 16;
  return padded((kTile + heads * block_rows) * head_dim / 2);
}

// For `heads` KV heads, `nodes` nodes, `group` query heads per KV head: two lists of offsets, each
// node's own, ranges of nodes and rows, q, scores, three states (chunk, split, row), a tile of keys
// or values in fp32 with its list, and AMX's copies.
inline int64_t attention_scratch_floats(int64_t heads, int64_t nodes, int64_t group,
                                        int64_t head_dim, int64_t words) {
  const int64_t rows = heads * nodes * group;
  return 4 * kListLength + padded(2 * nodes * own_list_length(words)) + 2 * padded(4 * nodes) +
         padded(4 * rows) + rows * padded(head_dim) + 2 * rows * (kChunk + kMaxLanes) +
         3 * attention_state_floats(rows, head_dim) + (kTile + kMaxLanes) * padded(head_dim) +
         padded(2 * (kTile + kMaxLanes)) + tile_products_floats(heads, nodes * group, head_dim);
}

}  // namespace inferlab::cpu
