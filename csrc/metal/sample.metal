// sample: the best num_samples tokens of each row by filtered logit / temperature + Gumbel noise.
//
// A threadgroup takes rows in turns; grid [groups]. Bytes: a row once to scan, once per draw, and
// some 8 (16-bit elements) to 25 times from cache per filter that needs a cut.
#include "row.h"

struct SampleShared {
  RowShared row;
};

[[max_total_threads_per_threadgroup(kThreads)]]
kernel void sample(
    device const Element* logits [[buffer(0)]], device const long* positions [[buffer(1)]],
    device const float* temperature [[buffer(2)]], device const int* top_k [[buffer(3)]],
    device const float* top_p [[buffer(4)]], device const float* min_p [[buffer(5)]],
    device const long* seed [[buffer(6)]], device const float* repetition [[buffer(7)]],
    device const float* presence [[buffer(8)]], device const float* frequency [[buffer(9)]],
    device const int* context_tokens [[buffer(10)]], device const int* context_lens [[buffer(11)]],
    device const int* prompt_lens [[buffer(12)]], device const int* bias_tokens [[buffer(13)]],
    device const float* bias_values [[buffer(14)]], device int* tokens [[buffer(15)]],
    device float* scores [[buffer(16)]], device float* workspace [[buffer(17)]],
    constant SampleParams& p [[buffer(18)]], uint3 group [[threadgroup_position_in_grid]],
    uint3 groups [[threadgroups_per_grid]], uint tid [[thread_index_in_threadgroup]]) {
  INFERLAB_SHARED(SampleShared, shared);
  const Group g{&shared.row, tid};
  const Sampling sampling{temperature, top_k,       top_p,      min_p,          seed,
                          repetition,  presence,    frequency,  context_tokens, context_lens,
                          prompt_lens, bias_tokens, bias_values};
  for (long i = group.x; i < p.batch * p.nodes; i += groups.x) {
    const long b = i / p.nodes, n = i % p.nodes;
    const Row raw{logits + b * p.logits.batch_stride + n * p.logits.node_stride, nullptr,
                  p.logits.allowed};
    const Row row = penalised(g, raw, sampling, p.sampling, b, nullptr, 0,
                              workspace + group.x * p.logits.allowed);
    Draw draw;
    const bool valid =
        open_draw(g, row, choice_of(sampling, b), uint(positions[i]), p.purpose, draw);
    ulong key = valid ? ~0UL : 0;
    for (long j = 0; j < p.num_samples; ++j) {
      if (key != 0) key = draw_below(g, row, draw, key);
      if (tid == 0) {
        const long at = i * p.num_samples + j;
        tokens[at] = key == 0 ? -1 : key_token(key);
        if (p.scores != 0) scores[at] = key == 0 ? -INFINITY : key_value(key);
      }
    }
  }
}
