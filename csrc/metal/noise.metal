// The noise itself, for known-answer tests: one thread per token or block.
#include "inferlab/noise.h"

using namespace inferlab;

kernel void gumbel_row(device float* out [[buffer(0)]], constant GumbelRowParams& p [[buffer(1)]],
                       uint3 group [[threadgroup_position_in_grid]],
                       uint3 threads [[threads_per_threadgroup]],
                       uint tid [[thread_index_in_threadgroup]]) {
  const long token = long(group.x) * threads.x + tid;
  if (token >= p.tokens) return;
  out[token] = gumbel(p.seed, p.position, uint(token), p.purpose);
}

kernel void philox_block(device uint* out [[buffer(0)]], constant PhiloxParams& p [[buffer(1)]],
                         uint tid [[thread_index_in_threadgroup]]) {
  if (tid != 0) return;
  const PhiloxBlock b =
      philox4x32_10(p.counter[0], p.counter[1], p.counter[2], p.counter[3], p.key[0], p.key[1]);
  for (uint i = 0; i < 4; ++i) out[i] = b.w[i];
}
