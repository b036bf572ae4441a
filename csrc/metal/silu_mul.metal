// silu_mul: out = silu(gate) * up, where a row of x is gate then up (Shazeer, 2020).
//
// One thread per element; grid [pieces of a row, rows]. Bytes: rows * 2 * dim elements read, rows *
// dim written.
#include "element.h"
#include "inferlab/layer.h"

kernel void silu_mul(device const Element* x [[buffer(0)]], device Element* out [[buffer(1)]],
                     constant SiluMulParams& p [[buffer(2)]],
                     uint3 group [[threadgroup_position_in_grid]],
                     uint3 threads [[threads_per_threadgroup]],
                     uint tid [[thread_index_in_threadgroup]]) {
  const long i = long(group.x) * threads.x + tid, row = group.y;
  if (i >= p.dim) return;
  const float gate = to_float(x[row * 2 * p.dim + i]);
  const float silu = rounded(gate / (1.0f + precise::exp(-gate)));
  out[row * p.dim + i] = to_element(silu * to_float(x[(row * 2 + 1) * p.dim + i]));
}
