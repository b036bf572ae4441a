// Splits the layer ops over rows. They read and write each element once:
//   rms_norm      rows * dim read and written, weight once
//   silu_mul      rows * 2 * dim read, rows * dim written
//   rope_append   B * N * (Hq + 2 * Hkv) * D read and written
#include "inferlab/layer.h"

#include "layer_rows.h"
#include "parallel.h"

namespace inferlab::cpu {

Status rms_norm(const RmsNormParams& p) {
  parallel_for(p.rows, 2 * p.rows * p.dim * dtype_size(p.dtype),
               [&](int64_t row) { INFERLAB_DISPATCH(rms_norm_row, p, row); });
  return Status::kOk;
}

Status silu_mul(const SiluMulParams& p) {
  parallel_for(p.rows, 3 * p.rows * p.dim * dtype_size(p.dtype),
               [&](int64_t row) { INFERLAB_DISPATCH(silu_mul_row, p, row); });
  return Status::kOk;
}

Status rope_append(const RopeAppendParams& p) {
  const int64_t row = (p.q_heads + 2 * p.kv_heads) * p.head_dim;
  parallel_for(p.batch * p.nodes, 2 * p.batch * p.nodes * row * dtype_size(p.dtype),
               [&](int64_t i) {
                 const int64_t b = i / p.nodes, n = i % p.nodes;
                 if (p.num_nodes != nullptr && n >= p.num_nodes[b]) return;
                 const RopeRow row{b * p.q_stride[0] + n * p.q_stride[1],
                                   b * p.k_stride[0] + n * p.k_stride[1],
                                   b * p.v_stride[0] + n * p.v_stride[1],
                                   p.head_dim,
                                   b * p.cos_stride / p.rotary + n,
                                   b,
                                   n};
                 INFERLAB_DISPATCH(rope_append_row, p, row);
               });
  return Status::kOk;
}

}  // namespace inferlab::cpu
