// The walk that all verifiers share: from the root, ask a rule for the child to enter.
#pragma once

#include "inferlab/noise.h"
#include "inferlab/verify.h"
#include "row.h"

namespace inferlab::cpu {

// The node that the walk stands on.
struct Visit {
  const VerifyParams& params;
  int64_t sequence;
  int64_t base;  // sequence * nodes: where its tree begins in tokens and links
  int64_t node;
  int64_t first_child;  // or -1
  uint32_t position;    // absolute, of the token chosen here
  bool threaded;        // whether rows are spread over the threads
};

struct Decision {
  int64_t child;  // the one entered, or -1
  int32_t token;  // what is emitted; -1: the row cannot be sampled from
};

// Enters the child that is the target's own choice.
Decision enter_if_chosen(const Visit& visit, const Row& row, const Choice& choice, Workspace& ws);

// rule(visit, row, workspace) -> Decision, once per node visited. Links go up in index, so the walk
// ends (the binding has checked).
template <typename Rule>
Status walk_trees(const VerifyParams& p, Rule rule) {
  const int64_t bytes = p.batch * p.logits.allowed * dtype_size(p.logits.dtype);
  return for_sequences(p.batch, bytes, [&](int64_t b, bool threaded) {
    Workspace& ws = Workspace::of_thread();
    ws.path.clear();
    const int64_t base = b * p.nodes;
    int32_t* nodes = p.accepted_nodes + base;
    int32_t* tokens = p.accepted_tokens + base;
    int64_t count = 0;
    for (int64_t node = 0; node >= 0;) {
      const auto position = static_cast<uint32_t>(p.seq_lens[b] + count + 1);
      const Visit visit{p, b, base, node, p.first_child[base + node], position, threaded};
      const Row row = open_row(p.logits, b, node, &p.sampling, ws.path, ws);
      const Decision decision = rule(visit, row, ws);
      nodes[count] = static_cast<int32_t>(node);
      tokens[count++] = decision.token;
      node = decision.child;
      if (node >= 0) ws.path.push_back(p.tokens[base + node]);
    }
    p.num_accepted[b] = static_cast<int32_t>(count);
    for (int64_t j = count; j < p.nodes; ++j) nodes[j] = tokens[j] = -1;
  });
}

}  // namespace inferlab::cpu
