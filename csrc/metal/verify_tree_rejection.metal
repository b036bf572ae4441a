// verify_tree_rejection: speculative sampling (Leviathan et al. 2023; Chen et al. 2023), on trees
// in rounds (SpecInfer, Miao et al. 2024):
//   accept child x        iff  u < p(x) / q(x)
//   after each rejection  p <- norm(max(p - q, 0));  without replacement q <- norm(q without x)
//   none accepted         draw from p
// p and q stand dense in the workspace, unnormalised beside their sums. Sums are integers: of
// weights in units of 2^-40, of residuals, which are normalised, in units of 2^-60.
//
// One threadgroup per sequence; grid [batch]. Bytes per node with children: both rows twice, 8 per
// token for the weights, and 20 per token and rejection.
#include "walk.h"

constant constexpr float kMassUnit = 9.094947017729282e-13f;      // 2^-40
constant constexpr float kResidualUnit = 8.673617379884035e-19f;  // 2^-60

constant constexpr float kEmpty = 1e-25f;  // a residual below it is nothing but rounding

struct RejectionShared {
  RowShared row;
};

// A normalised residual in units of 2^-60; what is below is nothing but rounding.
inline ulong residual_mass(float x) {
  const uint bits = noise_to_bits(x);
  const int shift = int(bits >> 23) - 150 + 60;
  const ulong mantissa = (bits & 0x007fffffu) | 0x00800000u;
  if (shift >= 0) return mantissa << shift;
  return shift <= -24 ? 0 : mantissa >> -shift;
}

// An unnormalised distribution: weights and what they are multiplied with.
struct Weights {
  device float* values;  // [size]
  ulong mass;            // their sum, in units of 2^-40 (not kept up for residuals)
  float scale;

  float at(long token, long size) const {
    return token >= 0 && token < size ? values[token] * scale : 0.0f;
  }
};

inline Weights fill_weights(Group g, device float* values, Row row, Softmax softmax, ulong cut) {
  ulong sum = 0;
  for (long t = g.tid; t < row.size; t += kThreads) {
    const float x = row.at(t);
    const float w = rank_key(x, uint(t)) < cut ? 0.0f : softmax.weight(x);
    values[t] = w;
    sum += mass_of(w);
  }
  device_barrier();
  sum = group_sum(g, sum);
  return Weights{values, sum, 1.0f / (float(sum) * kMassUnit)};
}

// w without a token; false: no more than `least` would be left of it, and it stays.
inline bool without(Group g, thread Weights& w, long token, long size, float least) {
  if (token < 0 || token >= size) return false;
  const float before = w.values[token];
  ulong mass = w.mass - mass_of(before);
  group_barrier();  // all have read it
  if (g.tid == 0) w.values[token] = 0.0f;
  device_barrier();
  if (mass < ulong(size) << 20) {
    // Too few units for so many tokens: count again in units of the largest weight that is left.
    ulong bits = 0;
    for (long t = g.tid; t < size; t += kThreads) {
      bits = Max::of(bits, ulong(noise_to_bits(w.values[t])));
    }
    const uint exponent = uint(group_max(g, bits)) >> 23;  // 0: what is left is no normal number
    const float up = noise_from_bits((254 - exponent) << 23);  // to [1, 2)
    mass = 0;
    for (long t = g.tid; t < size; t += kThreads) mass += mass_of(w.values[t] * up);
    mass = group_sum(g, mass);
    if (exponent == 0 || !(float(mass) * kMassUnit / up > least)) {
      if (g.tid == 0) w.values[token] = before;
      device_barrier();
      return false;
    }
    for (long t = g.tid; t < size; t += kThreads) w.values[t] *= up;
    device_barrier();
  }
  w.mass = mass;
  w.scale = 1.0f / (float(mass) * kMassUnit);
  return before > 0.0f;
}

// p <- max(p - q, 0); false: nothing is left of it by rounding, and it stays.
inline bool subtract(Group g, thread Weights& p, Weights q, long size) {
  ulong sum = 0;
  for (long t = g.tid; t < size; t += kThreads) {
    const float a = p.values[t] * p.scale, b = q.values[t] * q.scale;
    sum += a > b ? residual_mass(a - b) : 0;
  }
  sum = group_sum(g, sum);
  if (sum == 0) return false;
  for (long t = g.tid; t < size; t += kThreads) {
    const float a = p.values[t] * p.scale, b = q.values[t] * q.scale;
    p.values[t] = a > b ? a - b : 0.0f;
  }
  device_barrier();
  p.scale = 1.0f / (float(sum) * kResidualUnit);
  return true;
}

inline bool tried_before(Tree tree, long first, long child) {
  for (long c = first; c < child && c >= 0; c = tree.sibling_of(c)) {
    if (tree.tokens[c] == tree.tokens[child]) return true;
  }
  return false;
}

inline Decision run_rounds(Group g, Tree tree, Row row, Row draft, Choice choice, long node,
                           uint position, constant RejectionParams& params, device float* p_values,
                           device float* q_values) {
  float max;
  if (!scan(g, row, max)) return Decision{-1, -1};
  const bool filters = choice.filters(row.size), has_draft = params.draft_logits.data != 0;
  const ulong cut = filters ? find_cut(g, row, max, choice) : keep_all();
  const long first = tree.child_of(node);
  float draft_max = 0.0f;
  // A draft row that cannot have been sampled from: its children are passed over.
  const bool judged = first >= 0 && (!has_draft || scan(g, draft, draft_max));
  bool rejected = false;
  Weights p{p_values, 0, 0.0f}, q{q_values, 0, 0.0f};
  if (judged) {
    if (has_draft) {
      const ulong draft_cut = filters ? find_cut(g, draft, draft_max, choice) : keep_all();
      q = fill_weights(g, q_values, draft, softmax_of(choice, draft_max), draft_cut);
    }
    p = fill_weights(g, p_values, row, softmax_of(choice, max), cut);
  }
  for (long c = judged ? first : -1; c >= 0; c = tree.sibling_of(c)) {
    const long token = tree.tokens[c];
    if (!params.with_replacement && tried_before(tree, first, c)) continue;
    const float proposed = has_draft ? q.at(token, row.size) : 1.0f;
    const float wanted = p.at(token, row.size);
    const float u = noise_uniform(noise_word(choice.seed, position, uint(c), kPurposeAccept));
    // The sign of u q - p is that of the exact value.
    if (wanted > 0.0f && fma(u, proposed, -wanted) < 0.0f) return Decision{c, int(token)};
    if (!has_draft) {  // q is a point mass: p only loses the token
      rejected = without(g, p, token, row.size, kEmpty) || rejected;
      continue;
    }
    rejected = subtract(g, p, q, row.size) || rejected;
    if (!params.with_replacement) without(g, q, token, row.size, 0.0f);
  }
  // From the target itself if nothing was rejected, else from what p has become.
  Draw draw = draw_of(choice, position, kPurposeRecovery, cut);
  if (!rejected) return Decision{-1, draw_one(g, row, draw)};
  draw.score = kScoreLogGumbel;
  draw.cut = rank_key(kSmallestNormal, 0xffffffffu);  // noise_log takes normal floats
  return Decision{-1, draw_one(g, Row{row.raw, p.values, row.size}, draw)};
}

[[max_total_threads_per_threadgroup(kThreads)]]
kernel void verify_tree_rejection(
    device const Element* logits [[buffer(0)]], device const Element* draft_logits [[buffer(1)]],
    device const int* tokens [[buffer(2)]], device const int* first_child [[buffer(3)]],
    device const int* next_sibling [[buffer(4)]], device const int* seq_lens [[buffer(5)]],
    device const float* temperature [[buffer(6)]], device const int* top_k [[buffer(7)]],
    device const float* top_p [[buffer(8)]], device const float* min_p [[buffer(9)]],
    device const long* seed [[buffer(10)]], device const float* repetition [[buffer(11)]],
    device const float* presence [[buffer(12)]], device const float* frequency [[buffer(13)]],
    device const int* context_tokens [[buffer(14)]], device const int* context_lens [[buffer(15)]],
    device const int* prompt_lens [[buffer(16)]], device const int* bias_tokens [[buffer(17)]],
    device const float* bias_values [[buffer(18)]], device int* accepted_nodes [[buffer(19)]],
    device int* accepted_tokens [[buffer(20)]], device int* num_accepted [[buffer(21)]],
    device float* workspace [[buffer(22)]], constant RejectionParams& p [[buffer(23)]],
    uint3 group [[threadgroup_position_in_grid]], uint tid [[thread_index_in_threadgroup]]) {
  INFERLAB_SHARED(RejectionShared, shared);
  const Group g{&shared.row, tid};
  const Sampling sampling{temperature, top_k,       top_p,      min_p,          seed,
                          repetition,  presence,    frequency,  context_tokens, context_lens,
                          prompt_lens, bias_tokens, bias_values};
  const long b = group.x, base = b * p.walk.nodes, vocab = p.walk.logits.allowed;
  const Tree tree{tokens + base,         first_child + base,     next_sibling + base,
                  accepted_nodes + base, accepted_tokens + base, p.walk.nodes};
  const Choice choice = choice_of(sampling, b);
  device float* copy = workspace + b * kMetalRejectionRows * vocab;
  long count = 0;
  for (long node = 0; node >= 0;) {
    const Row raw{logits + b * p.walk.logits.batch_stride + node * p.walk.logits.node_stride,
                  nullptr, vocab};
    const Row draft{
        draft_logits + b * p.draft_logits.batch_stride + node * p.draft_logits.node_stride, nullptr,
        vocab};
    const Row row =
        penalised(g, raw, sampling, p.walk.sampling, b, tree.accepted_tokens, count, copy);
    const uint position = uint(seq_lens[b] + count + 1);
    const Decision d = choice.greedy() ? enter_if_chosen(g, tree, row, choice, node, position)
                                       : run_rounds(g, tree, row, draft, choice, node, position, p,
                                                    copy + vocab, copy + 2 * vocab);
    record(g, tree, count++, node, d);
    node = d.child;
  }
  finish(g, tree, count, num_accepted + b);
}
