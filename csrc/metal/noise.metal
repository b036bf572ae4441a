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

struct PhiloxParams {
  long counter[4], key[2];
};

kernel void philox(device uint* out [[buffer(0)]], constant PhiloxParams& p [[buffer(1)]],
                   uint tid [[thread_index_in_threadgroup]]) {
  if (tid != 0) return;
  const inferlab::PhiloxBlock b =
      inferlab::philox4x32_10(uint(p.counter[0]), uint(p.counter[1]), uint(p.counter[2]),
                              uint(p.counter[3]), uint(p.key[0]), uint(p.key[1]));
  for (uint i = 0; i < 4; ++i) out[i] = b.w[i];
}
