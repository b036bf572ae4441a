// A draft tree that grows where the draft is sure of itself (EAGLE-2).
//
// A level: the children that were drawn at the nodes expanded last, each with the log of the
// product of its confidences along the path (softmax of its score among its siblings'); the `width`
// surest ones are expanded next. The tree: the surest of all nodes seen. Ties go to the node seen
// first, so a parent never stands behind its child.
//
// Candidates are numbered as they are seen: [0, width) hang on the root, then width * width per
// level. Expanded node f (0: the root, then width per level) has the candidates
// [f * width, (f + 1) * width). Bytes: a few kilobytes; one task per sequence.
//
// grow_offsets is for drafts that guess every depth at once, whatever the path there (Medusa): all
// nodes of a depth have the same children. Taken is always the surest node that hangs on the tree:
// a node taken brings its first child and its next sibling into the choice. O(nodes log nodes).
#pragma once

#include <cstdint>

#include "inferlab/status.h"

namespace inferlab {

// Log confidence of what merely fills a row in which fewer than `width` tokens were drawn.
constexpr float kNeverConfident = -1e30f;

struct GrowLevelParams {
  const int32_t* drawn;      // [batch, parents, width], best first; -1 where there is none
  const float* scores;       // [batch, parents, width], what they were drawn by
  const uint64_t* above;     // [batch, parents, words] ancestor bits of the parents, or null: root
  int32_t* tokens;           // [batch, candidates] of the whole growth, filled level by level
  float* confidence;         // [batch, candidates]
  int32_t* expanded;         // [batch, expansions] candidate of each expanded node; entry 0 is -1
  int32_t* next_tokens;      // [batch, width] out, the nodes to expand next; null on the last level
  int64_t* next_parents;     // [batch, width] out, which of the parents each hangs on
  uint64_t* next_ancestors;  // [batch, width, words] out; bit 0 is the root, bit f expanded node f
  int64_t batch;
  int64_t level;  // 0 is the root's children
  int64_t parents;
  int64_t width;
  int64_t candidates;
  int64_t expansions;
  int64_t words;
};

struct GrowTreeParams {
  const int32_t* roots;     // [batch]
  const int32_t* tokens;    // [batch, candidates]
  const float* confidence;  // [batch, candidates]
  const int32_t* expanded;  // [batch, expansions]
  int32_t* tree_tokens;     // [batch, nodes] out, root first, then by confidence
  int32_t* tree_parents;    // [batch, nodes] out
  float* tree_confidence;   // [batch, nodes] out: log of the path's, 0 at the root
  int64_t batch;
  int64_t width;
  int64_t candidates;
  int64_t expansions;
  int64_t nodes;  // root included; at most 1 + candidates
};

struct GrowOffsetsParams {
  const int32_t* roots;    // [batch]
  const int32_t* drawn;    // [batch, depth, width], best first; -1 where there is none
  const float* scores;     // [batch, depth, width], what they were drawn by
  int32_t* tree_tokens;    // [batch, nodes] out, root first, then by confidence
  int32_t* tree_parents;   // [batch, nodes] out
  float* tree_confidence;  // [batch, nodes] out: log of the path's, 0 at the root
  int64_t batch;
  int64_t depth;
  int64_t width;
  int64_t nodes;  // root included; no more than there are paths
};

namespace cpu {
Status grow_level(const GrowLevelParams& params);
Status grow_tree(const GrowTreeParams& params);
Status grow_offsets(const GrowOffsetsParams& params);
}  // namespace cpu
}  // namespace inferlab
