// The walk that all verifiers share: from the root, ask a rule for the child to enter. Every block
// of the sequence's group walks along, and the first writes what is emitted. Links that do not go
// up in index end the walk, so that it always ends.
#pragma once

#include "inferlab/verify.h"
#include "row_filters.cuh"
#include "row_launch.cuh"

namespace inferlab::cuda {

constexpr int kTreeNodes = 256;  // trees up to this size are kept in shared memory

struct WalkShared {
  RowShared row;
  Choice choice;
  int32_t tree[3][kTreeNodes];
};

// The tree of one sequence.
class Tree {
 public:
  __device__ Tree(const VerifyParams& p, int64_t b, WalkShared& shared)
      : nodes_(static_cast<int32_t>(p.nodes)),
        tokens_(p.tokens + b * p.nodes),
        first_child_(p.first_child + b * p.nodes),
        next_sibling_(p.next_sibling + b * p.nodes) {
    if (nodes_ > kTreeNodes) return;
    __syncthreads();  // the last tree may still be read
    for (int32_t n = static_cast<int32_t>(threadIdx.x); n < nodes_; n += kThreads) {
      shared.tree[0][n] = tokens_[n];
      shared.tree[1][n] = first_child_[n];
      shared.tree[2][n] = next_sibling_[n];
    }
    __syncthreads();
    tokens_ = shared.tree[0];
    first_child_ = shared.tree[1];
    next_sibling_ = shared.tree[2];
  }

  __device__ __forceinline__ int32_t token(int32_t node) const { return tokens_[node]; }
  __device__ __forceinline__ int32_t first_child(int32_t node) const {
    return above(node, first_child_[node]);
  }
  __device__ __forceinline__ int32_t next_sibling(int32_t node) const {
    return above(node, next_sibling_[node]);
  }

 private:
  __device__ __forceinline__ int32_t above(int32_t node, int32_t link) const {
    return link > node && link < nodes_ ? link : -1;
  }

  int32_t nodes_;
  const int32_t *tokens_, *first_child_, *next_sibling_;
};

struct Decision {
  int32_t child;  // the one entered, or -1
  int32_t token;  // what is emitted; -1: the row cannot be sampled from
};

// The first child that holds `token`, if any.
__device__ __forceinline__ Decision enter_if_chosen(const Tree& tree, int32_t node, int32_t token) {
  int32_t child = token < 0 ? -1 : tree.first_child(node);
  while (child >= 0 && tree.token(child) != token) child = tree.next_sibling(child);
  return Decision{child, token};
}

// rule(node, position of the token chosen there) -> Decision, once per node visited; the same on
// all blocks of the group, or called on the first alone.
template <typename Rule>
__device__ void walk_tree(const VerifyParams& p, int64_t b, bool writes, Rule rule) {
  int32_t* nodes = p.accepted_nodes + b * p.nodes;
  int32_t* tokens = p.accepted_tokens + b * p.nodes;
  int32_t count = 0;
  for (int32_t node = 0; node >= 0;) {
    const Decision decision =
        rule(node, static_cast<uint32_t>(p.seq_lens[b]) + static_cast<uint32_t>(count) + 1u);
    if (writes && threadIdx.x == 0) {
      nodes[count] = node;
      tokens[count] = decision.token;
    }
    ++count;
    node = decision.child;
  }
  if (!writes) return;
  if (threadIdx.x == 0) p.num_accepted[b] = count;
  for (int64_t j = count + threadIdx.x; j < p.nodes; j += kThreads) nodes[j] = tokens[j] = -1;
}

}  // namespace inferlab::cuda
