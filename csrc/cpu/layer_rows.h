// One row or one token of each layer op: what csrc/cpu/kernels/layer.cpp computes, for the ops and
// for the decoder.
#pragma once

#include <cstdint>

#include "inferlab/layer.h"
#include "isa.h"

namespace inferlab::cpu {

// A token: where its q, k and v begin, in elements, and its row of cos and sin. It goes to the slot
// of node n of sequence b.
struct RopeRow {
  int64_t q, k, v, angles;
  int64_t b, n;
};

INFERLAB_DECLARE_KERNEL(void, rms_norm_row, const RmsNormParams&, int64_t)
INFERLAB_DECLARE_KERNEL(void, silu_mul_row, const SiluMulParams&, int64_t)
INFERLAB_DECLARE_KERNEL(void, rope_append_row, const RopeAppendParams&, const RopeRow&)

}  // namespace inferlab::cpu
