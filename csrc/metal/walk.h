// The walk that all verifiers share: from the root, a rule says which child is entered and which
// token is emitted. All threads of a sequence's threadgroup take the same decisions.
#pragma once

#include "inferlab/verify.h"
#include "row.h"

// One tree and where its walk is written.
struct Tree {
  device const int* tokens;  // [nodes], as all of these
  device const int* first_child;
  device const int* next_sibling;
  device int* accepted_nodes;
  device int* accepted_tokens;
  long nodes;

  // Links go up in index; whatever does not is no link.
  long child_of(long n) const { return after(n, first_child[n]); }
  long sibling_of(long n) const { return after(n, next_sibling[n]); }
  long after(long n, long link) const { return link > n && link < nodes ? link : -1; }
};

struct Decision {
  long child;  // the one entered, or -1
  int token;   // what is emitted; -1: the row cannot be sampled from
};

// Writes step `count` of the walk. The tokens emitted so far are the path to the next node.
inline void record(Group g, Tree tree, long count, long node, Decision d) {
  if (g.tid == 0) {
    tree.accepted_nodes[count] = int(node);
    tree.accepted_tokens[count] = d.token;
  }
  device_barrier();
}

inline void finish(Group g, Tree tree, long count, device int* num_accepted) {
  if (g.tid == 0) *num_accepted = int(count);
  for (long j = count + g.tid; j < tree.nodes; j += kThreads) {
    tree.accepted_nodes[j] = -1;
    tree.accepted_tokens[j] = -1;
  }
}

// Enters the child that is the target's own choice.
inline Decision enter_if_chosen(Group g, Tree tree, Row row, Choice choice, long node,
                                uint position) {
  Draw draw;
  if (!open_draw(g, row, choice, position, kPurposeToken, draw)) return Decision{-1, -1};
  const int token = draw_one(g, row, draw);
  for (long c = tree.child_of(node); c >= 0; c = tree.sibling_of(c)) {
    if (tree.tokens[c] == token) return Decision{c, token};
  }
  return Decision{-1, token};
}
