// kv_append: row n of sequence b -> slot seq_lens[b] + node_offset + n of the K and V pages.
//
// One threadgroup per row, of K or of V; its threads copy the row's words side by side. Grid
// [nodes, batch, 2]. Bytes: 2 * B * N * Hkv * D * s read and as many written. Rows whose slot does
// not exist are skipped.
#include "pages.h"
#include "word.h"

kernel void kv_append(device const Word* k [[buffer(0)]], device const Word* v [[buffer(1)]],
                      device Word* k_pages [[buffer(2)]], device Word* v_pages [[buffer(3)]],
                      device const int* block_table [[buffer(4)]],
                      device const int* seq_lens [[buffer(5)]],
                      device const int* num_nodes [[buffer(6)]],
                      constant KvAppendParams& p [[buffer(7)]],
                      uint3 group [[threadgroup_position_in_grid]],
                      uint3 threads [[threads_per_threadgroup]],
                      uint tid [[thread_index_in_threadgroup]]) {
  const long n = group.x, b = group.y;
  if (p.num_nodes != 0 && n >= num_nodes[b]) return;
  const long row = row_of_slot(block_table, p, b, seq_lens[b] + p.node_offset + n);
  if (row < 0) return;
  const bool is_v = group.z == 1;
  constant int64_t* stride = is_v ? p.v_stride_bytes : p.k_stride_bytes;
  device const Word* from = (is_v ? v : k) + words_in(b * stride[0] + n * stride[1]);
  const long head_stride = words_in(stride[2]), head_words = words_in(p.head_bytes);
  device Word* to = (is_v ? v_pages : k_pages) + row * p.heads * head_words;
  for (long w = tid; w < p.heads * head_words; w += threads.x) {
    const long head = w / head_words;
    to[w] = from[head * head_stride + (w - head * head_words)];
  }
}
