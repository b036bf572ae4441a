// The small ops between the matrix products of a decoder layer, fused so that a token costs a few
// passes over its own row instead of a dozen launches. Arithmetic is fp32; results are rounded to
// the element type where the unfused layer rounds.
#pragma once

#include "inferlab/page_format.h"
#include "inferlab/status.h"

namespace inferlab {

// out = weight * (x / sqrt(mean(x^2) + eps)), row by row. Zhang & Sennrich, 2019.
struct RmsNormParams {
  Ptr<const void> x;       // [rows, dim], rows `x_stride` elements apart
  Ptr<const void> weight;  // [dim]
  Ptr<void> out;           // [rows, dim], rows `out_stride` elements apart; may be x
  int64_t rows, dim, x_stride, out_stride;
  float eps;
  float offset;  // added to the weight (Gemma counts from 1); 0: normed values are rounded, too
  DType dtype;
};

// out = silu(gate) * up, where a row of x is gate then up. Shazeer, 2020.
struct SiluMulParams {
  Ptr<const void> x;  // [rows, 2 * dim]
  Ptr<void> out;      // [rows, dim]
  int64_t rows, dim;
  DType dtype;
};

// Rotates q in place and writes the rotated k and v to the pages. Su et al., 2021, with the two
// halves of the first `rotary` channels as the pairs (as in GPT-NeoX and Llama).
struct RopeAppendParams {
  Ptr<void> q;          // [B, N, Hq, D]
  Ptr<const void> k;    // [B, N, Hkv, D]
  Ptr<const void> v;    // [B, N, Hkv, D]
  int64_t q_stride[2];  // of b and n, in elements; heads and D are contiguous
  int64_t k_stride[2];
  int64_t v_stride[2];
  Ptr<const void> cos;  // [B or 1, N, rotary], `cos_stride` elements between sequences
  Ptr<const void> sin;
  int64_t cos_stride;
  Ptr<void> k_pages;               // [P, page_size, Hkv, D]
  Ptr<void> v_pages;               // [P, page_size, Hkv, D]
  Ptr<const int32_t> block_table;  // [B, max_pages]
  int64_t table_stride;
  Ptr<const int32_t> seq_lens;   // [B]
  Ptr<const int32_t> num_nodes;  // [B] or null: all N
  int64_t batch, nodes, q_heads, kv_heads, head_dim, rotary;
  int64_t pages, page_size, max_pages, node_offset;
  DType dtype;  // of all but pages in 8 bits
  PageFormat format;
};

#if !defined(__METAL_VERSION__)
namespace cpu {
Status rms_norm(const RmsNormParams& params);
Status silu_mul(const SiluMulParams& params);
Status rope_append(const RopeAppendParams& params);
}  // namespace cpu

// Pointers on the device, lengths and page ids included. A token whose slot lies outside the table
// or the pool has its q rotated and nothing written to the pages.
namespace cuda {
Status rms_norm(const RmsNormParams& params, void* stream);
Status silu_mul(const SiluMulParams& params, void* stream);
Status rope_append(const RopeAppendParams& params, void* stream);
}  // namespace cuda
#endif

}  // namespace inferlab
