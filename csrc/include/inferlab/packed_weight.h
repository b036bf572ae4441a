// Weights of 8 or 4 bits, packed in the order in which a product reads them.
//
// w[n, k] = scale (q - zero) with q of `bits` bits, zero 128 or 8; a scale, bf16, holds for a group
// of inputs of an output, in 8 bits for all of them. Where `zeros` is set, of 4 bits, scales are
// f16 and each has a zero of its own, as GPTQ and AWQ leave them. x is rounded to 8 bits, too, with
// a scale for each row and group, so that an input that is far out costs its own group alone:
//
//     y[m, n] = sum over groups g of  sx[m, g] scale[n, g] sum over k in g of (q[n, k] - zero)
//     x8[m, k]
//
// The inner sums are whole numbers, so they are the same on every instruction set; the outer ones
// are fp32, in the order of g.
//
// Outputs stand in tiles of 16. Of each tile first the scales, [groups][16], and zeros, as bytes,
// likewise, up to a multiple of 64 bytes; then q: in 8 bits [in / 4][16 outputs][4 inputs]; in 4
// bits [in / 8][16][4], byte i has input i in its low half and input 4 + i in its high one. Beyond
// the last output and input nothing of it counts.
#pragma once

#include <cstdint>

#include "inferlab/linear.h"

namespace inferlab {
inline namespace INFERLAB_INLINE_NAMESPACE {

constexpr int64_t kPackedOutputs = 16;  // of a tile

inline int64_t packed_groups(const LinearParams& p) { return (p.in + p.group - 1) / p.group; }
inline int64_t packed_scale_bytes(const LinearParams& p) {
  const int64_t scales = p.bits == 8 ? 1 : packed_groups(p);
  return (scales * kPackedOutputs * (p.zeros ? 3 : 2) + 63) / 64 * 64;
}
inline int64_t packed_tiles(const LinearParams& p) {
  return (p.out + kPackedOutputs - 1) / kPackedOutputs;
}
inline int64_t packed_tile_bytes(const LinearParams& p) {
  return packed_scale_bytes(p) + packed_groups(p) * p.group * kPackedOutputs * p.bits / 8;
}

}  // namespace INFERLAB_INLINE_NAMESPACE
}  // namespace inferlab
