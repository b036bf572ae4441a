// One row or one token of each layer op, and of what the decoder does beside them: what
// csrc/cpu/kernels/layer.cpp computes.
#pragma once

#include <cstdint>

#include "inferlab/decoder.h"
#include "inferlab/layer.h"
#include "isa.h"

namespace inferlab::cpu {

// A token: where its q, k and v begin, in elements, from which head to the next it is
// `head_stride`, and its row of cos and sin. It goes to the slot of node n of sequence b.
struct RopeRow {
  int64_t q, k, v, head_stride, angles;
  int64_t b, n;
};

// out = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias. Ba et al., 2016.
struct LayerNormRow {
  const void* x;
  const void* weight;
  const void* bias;  // or null
  void* out;         // may be x
  int64_t dim;
  float eps;
  DType dtype;
};

// out = activation(x), times `up` where there is one. GELU (Hendrycks & Gimpel, 2016) by erf, or by
// its approximation with tanh.
struct ActivationRow {
  Activation activation;
  const void* x;
  const void* up;  // or null
  void* out;
  int64_t dim;
  DType dtype;
};

// out = scale * x + y. Without a y: scale * x.
struct SumRow {
  float scale;
  const void* x;
  const void* y;
  void* out;  // may be x or y
  int64_t dim;
  DType dtype;
};

// x = cap * tanh(x / cap)
struct SoftcapRow {
  void* x;
  int64_t dim;
  float cap;
  DType dtype;
};

INFERLAB_DECLARE_KERNEL(void, rms_norm_row, const RmsNormParams&, int64_t)
INFERLAB_DECLARE_KERNEL(void, silu_mul_row, const SiluMulParams&, int64_t)
INFERLAB_DECLARE_KERNEL(void, rope_append_row, const RopeAppendParams&, const RopeRow&)
INFERLAB_DECLARE_KERNEL(void, layer_norm_row, const LayerNormRow&)
INFERLAB_DECLARE_KERNEL(void, activation_row, const ActivationRow&)
INFERLAB_DECLARE_KERNEL(void, sum_row, const SumRow&)
INFERLAB_DECLARE_KERNEL(void, softcap_row, const SoftcapRow&)

}  // namespace inferlab::cpu
