// y = x W^T (+ bias) (+ residual) for few rows of x: the matrix product of decoding, where reading
// W is the work. Each output is a chain of fp32 sums over k, in the same order for any number of
// rows and threads: a token's result does not depend on what is verified beside it. On CUDA what
// stands before and behind a product in a decoder layer can be part of it.
#pragma once

#include <cstdint>

#include "inferlab/dtype.h"
#include "inferlab/status.h"

namespace inferlab {

struct LinearParams {
  const void* x;         // [rows, in], rows `x_stride` elements apart
  const void* weight;    // [out, in]; gated: [2 * out, in], the gate's rows, then up's
  const void* bias;      // [rows of the weight] or null
  const void* residual;  // [rows, out] or null; may be y
  void* y;               // [rows, out]
  int64_t rows, in, out, x_stride;
  DType dtype;
  // CUDA alone. norm: [in] or null, x is RMS-normed first (layer.h). gated: y = silu(gate) * up.
  const void* norm;
  float norm_eps;
  bool gated;
  // No kernel that is still under way writes the weight: on a GPU it may be read before those that
  // come first have ended.
  bool weight_is_constant;
};

namespace cpu {
Status linear(const LinearParams& params);
}

// For f16 and bf16, up to 64 rows (16 with a norm), `in` a multiple of 32 (64 for more than 16
// rows), rows of x 16-byte aligned: kBadArgument for what can_linear refuses.
namespace cuda {
bool can_linear(const LinearParams& params);
int64_t linear_workspace_bytes(const LinearParams& params);
Status linear(const LinearParams& params, void* workspace, void* stream);
}  // namespace cuda

}  // namespace inferlab
