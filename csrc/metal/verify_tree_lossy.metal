// verify_tree_lossy: accepts children that the target finds good enough (conf_threshold,
// topk_agree, typical); where none is, the target's own choice is emitted.
//
// One threadgroup per sequence; grid [batch]. Bytes: the visited rows, as in `sample`, and for
// `typical` once more per child.
#include "walk.h"

struct LossyShared {
  RowShared row;
};

// What a policy knows of a row.
struct Judge {
  Row row;
  Softmax softmax;
  LossyPolicy policy;
  float threshold;
  ulong kept;    // the filters' cut
  ulong agree;   // topk_agree: the cut of the k most probable
  ulong total;   // mass of the kept
  float center;  // typical: mean log weight; -log p(x) - entropy = center - log weight(x)
};

inline Judge open_judge(Group g, Row row, float max, Choice choice, LossyPolicy policy, long top_k,
                        float threshold) {
  // At temperature 0: the untruncated softmax, since a one-hot p would leave nothing to judge.
  const bool filtered = !choice.greedy() && choice.filters(row.size);
  Judge j{row,
          choice.greedy() ? Softmax{max, 1.0f} : softmax_of(choice, max),
          policy,
          threshold,
          filtered ? find_cut(g, row, max, choice) : keep_all(),
          keep_all(),
          0,
          0.0f};
  if (policy == LossyPolicy::kTopkAgree) {
    if (top_k < row.size) j.agree = top_k_cut(g, row, max, top_k);
    return j;
  }
  j.total = total(g, row, Measure{true, j.kept, j.softmax});
  if (policy == LossyPolicy::kTypical) {
    ulong sum = 0;  // of -weight * log weight, in units of mass
    for (long t = g.tid; t < row.size; t += kThreads) {
      const float x = row.at(t);
      if (rank_key(x, uint(t)) < j.kept) continue;
      const float z = j.softmax.log_weight(x);
      if (z > -104.0f) sum += mass_of(weight_exp(z) * fabs(z));
    }
    j.center = -(float(group_sum(g, sum)) / float(j.total));
  }
  return j;
}

inline bool accepts(Group g, Judge j, long token) {
  if (token < 0 || token >= j.row.size) return false;
  const float x = j.row.at(token);
  const ulong key = rank_key(x, uint(token));
  if (key < j.kept) return false;
  if (j.policy == LossyPolicy::kTopkAgree) return key >= j.agree;
  if (j.policy == LossyPolicy::kConfThreshold) {
    return j.softmax.weight(x) / (float(j.total) * 9.094947017729282e-13f) >= j.threshold;  // 2^-40
  }
  const float distance = fabs(j.softmax.log_weight(x) - j.center);
  ulong nearer = 0;
  for (long t = g.tid; t < j.row.size; t += kThreads) {
    const float y = j.row.at(t);
    if (rank_key(y, uint(t)) < j.kept) continue;
    const float d = fabs(j.softmax.log_weight(y) - j.center);
    if (d < distance || (d == distance && t < token)) nearer += mass_of(j.softmax.weight(y));
  }
  nearer = group_sum(g, nearer);
  return j.threshold > 0.0f && nearer < mass_target(j.threshold, j.total);
}

inline Decision judge_children(Group g, Tree tree, Row row, Choice choice, long node, uint position,
                               constant LossyParams& p) {
  const long first = tree.child_of(node);
  if (first < 0) {
    Draw draw;
    if (!open_draw(g, row, choice, position, kPurposeToken, draw)) return Decision{-1, -1};
    return Decision{-1, draw_one(g, row, draw)};
  }
  float max;
  if (!scan(g, row, max)) return Decision{-1, -1};
  const Judge judge = open_judge(g, row, max, choice, p.policy, p.top_k, p.threshold_f32);
  for (long c = first; c >= 0; c = tree.sibling_of(c)) {
    if (accepts(g, judge, tree.tokens[c])) return Decision{c, tree.tokens[c]};
  }
  return Decision{-1, draw_one(g, row, draw_of(choice, position, kPurposeToken, judge.kept))};
}

[[max_total_threads_per_threadgroup(kThreads)]]
kernel void verify_tree_lossy(
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
    constant LossyParams& p [[buffer(22)]], uint3 group [[threadgroup_position_in_grid]],
    uint tid [[thread_index_in_threadgroup]]) {
  INFERLAB_SHARED(LossyShared, shared);
  const Group g{&shared.row, tid};
  const Sampling sampling{temperature, top_k,       top_p,      min_p,          seed,
                          repetition,  presence,    frequency,  context_tokens, context_lens,
                          prompt_lens, bias_tokens, bias_values};
  const long b = group.x, base = b * p.walk.nodes;
  const Tree tree{tokens + base,         first_child + base,     next_sibling + base,
                  accepted_nodes + base, accepted_tokens + base, p.walk.nodes};
  const Choice choice = choice_of(sampling, b);
  long count = 0;
  for (long node = 0; node >= 0;) {
    const Row raw{logits + b * p.walk.logits.batch_stride + node * p.walk.logits.node_stride,
                  nullptr, p.walk.logits.allowed};
    const Row row = penalised(g, raw, sampling, p.walk.sampling, b, tree.accepted_tokens, count,
                              workspace + b * p.walk.logits.allowed);
    const Decision d = judge_children(g, tree, row, choice, node, uint(seq_lens[b] + count + 1), p);
    record(g, tree, count++, node, d);
    node = d.child;
  }
  finish(g, tree, count, num_accepted + b);
}
