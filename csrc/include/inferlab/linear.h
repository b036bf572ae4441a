// y = x W^T (+ bias) (+ residual) for few rows of x: the matrix product of decoding, where reading
// W is the work. Each output is a chain of fp32 sums over k, in the same order for any number of
// rows and threads: a token's result does not depend on what is verified beside it.
#pragma once

#include <cstdint>

#include "inferlab/dtype.h"
#include "inferlab/status.h"

namespace inferlab {

struct LinearParams {
  const void* x;         // [rows, in], rows `x_stride` elements apart
  const void* weight;    // [out, in]
  const void* bias;      // [out] or null
  const void* residual;  // [rows, out] or null; may be y
  void* y;               // [rows, out]
  int64_t rows, in, out, x_stride;
  DType dtype;
  // No kernel that is still under way writes the weight: on a GPU it may be read before those that
  // come first have ended.
  bool weight_is_constant;
  // 8 or 4: `weight` is packed (packed_weight.h), of this many bits, and x is rounded to 8 bits in
  // groups of so many inputs. 0: as it is.
  int bits = 0;
  int64_t group = 0;
  bool zeros = false;  // packed with zeros of groups
  // Packed: [in], which of x stands at each input of the weight, as GPTQ orders them by activation;
  // null: they stand as they come.
  const int32_t* order = nullptr;
};

namespace cpu {
Status linear(const LinearParams& params);
}

// For f16 and bf16, up to 16 rows, `in` a multiple of 32, rows of x 16-byte aligned: kBadArgument
// for what can_linear refuses.
namespace cuda {
bool can_linear(const LinearParams& params);
Status linear(const LinearParams& params, void* stream);
}  // namespace cuda

}  // namespace inferlab
