// Attention of tree nodes (or a prompt's tokens) over the paged KV cache:
//
//   out[b][n][h] = sum_p softmax_p(cap(scale * q[b][n][h] . k(p))) v(p)
//
// over the positions p that row n sees. Position p < seq_len is slot p. Behind it stand the row's
// own ancestors: the i-th set bit j of its ancestor row is slot seq_len + j at position seq_len +
// i. Without ancestors row n is token node_offset + n of a chain, and position p is slot p for all
// p. With a window w only the last w positions, the row's own included, are seen.
#pragma once

#include "inferlab/page_format.h"
#include "inferlab/status.h"

namespace inferlab {

struct AttentionParams {
  Ptr<const void> q;               // [B, N, Hq, D]
  int64_t q_stride[3];             // of b, n, head, in elements; D is contiguous
  Ptr<const void> k_pages;         // [P, page_size, Hkv, D]
  Ptr<const void> v_pages;         // [P, page_size, Hkv, D]
  Ptr<const int32_t> block_table;  // [B, max_pages]
  int64_t table_stride;            // elements between rows of block_table
  Ptr<const int32_t> seq_lens;     // [B]
  Ptr<const uint64_t> ancestors;   // [B, N, W] or null: causal
  Ptr<const int32_t> num_nodes;    // [B] or null: all N
  Ptr<void> out;                   // [B, N, Hq, D] contiguous, zeros in padding rows
  int64_t batch, nodes, words;
  int64_t q_heads, kv_heads, head_dim;  // head_dim a multiple of 8
  int64_t pages, max_pages;
  int64_t page_size;  // a power of two
  int64_t node_offset;
  int64_t window;  // 0: none
  float scale;
  float softcap;  // 0: none
  DType dtype;    // of q and out, and of pages in kSame
  PageFormat format;
};

#if !defined(__METAL_VERSION__)
namespace cpu {
Status paged_tree_attention(const AttentionParams& params);
}

namespace cuda {
// Of `workspace` below, on the current device, for these shapes (pointers are not read).
int64_t attention_workspace_bytes(const AttentionParams& params);

// Pointers on the device, lengths included; launched on `stream`. k_pages, v_pages, out and
// workspace are aligned to 16 bytes. Slots and pages that do not exist are not read.
Status paged_tree_attention(const AttentionParams& params, void* workspace, void* stream);
}  // namespace cuda
#endif

}  // namespace inferlab
