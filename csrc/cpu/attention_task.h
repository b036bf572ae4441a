// The unit of attention work between csrc/cpu/attention.cpp (who does what) and the kernels (how).
#pragma once

#include "inferlab/attention.h"

namespace inferlab::cpu {

// Softmax statistics are taken per chunk of positions, chunks are merged in order into a split, and
// splits in order into the row. Both sizes are fixed and counted from position 0, so that a row's
// arithmetic is the same whoever does it.
constexpr int64_t kChunk = 256;
constexpr int64_t kSplit = 1024;
constexpr int64_t kMaxLanes = 16;

// Nodes [node_begin, node_end) x the query heads of one KV head, over splits [split_begin,
// split_end).
struct AttentionTask {
  int64_t b, kv_head;
  int64_t node_begin, node_end;
  int64_t split_begin, split_end;
  float* scratch;  // attention_scratch_floats(rows, head_dim), 64-byte aligned
  float*
      partials;  // null: finish the rows. Otherwise attention_state_floats per split, from split 0
};

inline int64_t padded_dim(int64_t head_dim) {
  return (head_dim + kMaxLanes - 1) & ~(kMaxLanes - 1);
}

// m[rows], l[rows], acc[rows][padded_dim]
inline int64_t attention_state_floats(int64_t rows, int64_t head_dim) {
  return ((2 * rows + kMaxLanes - 1) & ~(kMaxLanes - 1)) + rows * padded_dim(head_dim);
}

// q, scores, three states (chunk, split, row), two offset lists, the ranges of the nodes
inline int64_t attention_scratch_floats(int64_t rows, int64_t head_dim) {
  return rows * padded_dim(head_dim) + rows * (kChunk + kMaxLanes) +
         3 * attention_state_floats(rows, head_dim) + 4 * (kChunk + kMaxLanes) + 8 * rows + 64;
}

}  // namespace inferlab::cpu
