// The noise itself, for known-answer tests: one thread per token or block.
#include "inferlab/noise.h"

struct GumbelRowParams {
  long seed, position, purpose, count;
};

kernel void gumbel_row(device float* out [[buffer(0)]], constant GumbelRowParams& p [[buffer(1)]],
                       uint3 group [[threadgroup_position_in_grid]],
                       uint3 threads [[threads_per_threadgroup]],
                       uint tid [[thread_index_in_threadgroup]]) {
  const long token = long(group.x) * threads.x + tid;
  if (token >= p.count) return;
  out[token] = inferlab::gumbel(ulong(p.seed), uint(p.position), uint(token), uint(p.purpose));
}

// Per block: four words of counter and two of key in, four words out.
kernel void philox(device const uint* in [[buffer(0)]], device uint* out [[buffer(1)]],
                   uint3 group [[threadgroup_position_in_grid]],
                   uint tid [[thread_index_in_threadgroup]]) {
  if (tid != 0) return;
  device const uint* c = in + group.x * 6;
  const inferlab::PhiloxBlock b = inferlab::philox4x32_10(c[0], c[1], c[2], c[3], c[4], c[5]);
  for (uint i = 0; i < 4; ++i) out[group.x * 4 + i] = b.w[i];
}
