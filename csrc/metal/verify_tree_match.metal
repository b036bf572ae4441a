// verify_tree_match: accepts a child where it is the target's own choice.
//
// One threadgroup per sequence; grid [batch]. Bytes: the visited rows, as in `sample`.
#include "walk.h"

struct MatchShared {
  RowShared row;
};

[[max_total_threads_per_threadgroup(kThreads)]]
kernel void verify_tree_match(
    device const Element* logits [[buffer(0)]], device const int* tokens [[buffer(1)]],
    device const int* first_child [[buffer(2)]], device const int* next_sibling [[buffer(3)]],
    device const int* seq_lens [[buffer(4)]], device const float* temperature [[buffer(5)]],
    device const int* top_k [[buffer(6)]], device const float* top_p [[buffer(7)]],
    device const float* min_p [[buffer(8)]], device const long* seed [[buffer(9)]],
    device const float* repetition [[buffer(10)]], device const float* presence [[buffer(11)]],
    device const float* frequency [[buffer(12)]], device const int* context_tokens [[buffer(13)]],
    device const int* context_lens [[buffer(14)]], device const int* prompt_lens [[buffer(15)]],
    device const int* bias_tokens [[buffer(16)]], device const float* bias_values [[buffer(17)]],
    device int* accepted_nodes [[buffer(18)]], device int* accepted_tokens [[buffer(19)]],
    device int* num_accepted [[buffer(20)]], device float* workspace [[buffer(21)]],
    constant VerifyParams& p [[buffer(22)]], uint3 group [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]]) {
  INFERLAB_SHARED(MatchShared, shared);
  const Group g{&shared.row, tid};
  const Sampling sampling{temperature, top_k,       top_p,      min_p,          seed,
                          repetition,  presence,    frequency,  context_tokens, context_lens,
                          prompt_lens, bias_tokens, bias_values};
  const long b = group.x, base = b * p.nodes;
  const Tree tree{tokens + base,         first_child + base,     next_sibling + base,
                  accepted_nodes + base, accepted_tokens + base, p.nodes};
  const Choice choice = choice_of(sampling, b);
  long count = 0;
  for (long node = 0; node >= 0;) {
    const Row raw{logits + b * p.logits.batch_stride + node * p.logits.node_stride, nullptr,
                  p.logits.allowed};
    const Row row = penalised(g, raw, sampling, p.sampling, b, tree.accepted_tokens, count,
                              workspace + b * p.logits.allowed);
    const Decision d = enter_if_chosen(g, tree, row, choice, node, uint(seq_lens[b] + count + 1));
    record(g, tree, count++, node, d);
    node = d.child;
  }
  finish(g, tree, count, num_accepted + b);
}
