// The paged KV cache. Slot s of sequence b is row s % page_size of page block_table[b][s /
// page_size]; a row is [Hkv, D] elements. All sizes in bytes where they say so: these ops only move
// memory. On CUDA nobody reads lengths and ids before the kernels do: a slot outside the table or
// on a page outside the pool is neither read nor written.
#pragma once

#include "inferlab/page_format.h"
#include "inferlab/status.h"

namespace inferlab {

// Row n of sequence b -> slot seq_lens[b] + node_offset + n, for n < num_nodes[b].
struct KvAppendParams {
  Ptr<const char> k;          // [B, N, Hkv, D]
  Ptr<const char> v;          // [B, N, Hkv, D]
  int64_t k_stride_bytes[3];  // of b, n, head; D is contiguous
  int64_t v_stride_bytes[3];
  Ptr<char> k_pages;               // [P, page_size, Hkv, D]
  Ptr<char> v_pages;               // [P, page_size, Hkv, D]
  Ptr<const int32_t> block_table;  // [B, max_pages]
  int64_t table_stride;            // elements between rows of block_table
  Ptr<const int32_t> seq_lens;     // [B]
  Ptr<const int32_t> num_nodes;    // [B] or null: all N
  int64_t batch, nodes, heads, pages, page_size, max_pages, node_offset;
  int64_t head_bytes;  // D elements, of k and v
  DType dtype;         // of k and v
  PageFormat format;
};

// Slot seq_lens[b] + accepted[b][j] -> slot seq_lens[b] + j, for j < num_accepted[b], in every
// layer. accepted[b] increases, so a row is read before the row that takes its place is written.
struct KvCompactParams {
  Ptr<char> k_cache;               // [L, P, page_size, Hkv, D]
  Ptr<char> v_cache;               // [L, P, page_size, Hkv, D]
  Ptr<const int32_t> block_table;  // [B, max_pages]
  int64_t table_stride;
  Ptr<const int32_t> seq_lens;      // [B]
  Ptr<const int32_t> accepted;      // [B, S]
  Ptr<const int32_t> num_accepted;  // [B]
  int64_t layers, pages, page_size, max_pages, batch, steps;
  int64_t row_bytes;  // Hkv * D elements
};

// out[b][s] = slot s of sequence b for s < seq_lens[b], zeros from there to max_len.
struct KvGatherParams {
  Ptr<const char> pool;            // [P, page_size, Hkv, D]
  Ptr<const int32_t> block_table;  // [B, max_pages]
  int64_t table_stride;
  Ptr<const int32_t> seq_lens;  // [B]
  Ptr<char> out;                // [B, max_len, Hkv, D]
  int64_t batch, max_len, pages, page_size, max_pages;
  int64_t row_bytes;
};

// Page src[i] -> page dst[i] in every layer. No page is written twice or read by another pair.
struct KvCopyPagesParams {
  Ptr<char> k_cache;       // [L, P, page_size, Hkv, D]
  Ptr<char> v_cache;       // [L, P, page_size, Hkv, D]
  Ptr<const int32_t> src;  // [M]
  Ptr<const int32_t> dst;  // [M]
  int64_t layers, pages, moves;
  int64_t page_bytes;  // page_size * Hkv * D elements
};

#if !defined(__METAL_VERSION__)
namespace cpu {
Status kv_append(const KvAppendParams& params);
Status kv_compact(const KvCompactParams& params);
Status kv_gather(const KvGatherParams& params);
Status kv_copy_pages(const KvCopyPagesParams& params);
}  // namespace cpu

// Pointers on the device, ids and lengths included; launched on `stream`.
namespace cuda {
Status kv_append(const KvAppendParams& params, void* stream);
Status kv_compact(const KvCompactParams& params, void* stream);
Status kv_gather(const KvGatherParams& params, void* stream);
// Pairs out of [0, pages) are skipped.
Status kv_copy_pages(const KvCopyPagesParams& params, void* stream);
}  // namespace cuda
#endif

}  // namespace inferlab
