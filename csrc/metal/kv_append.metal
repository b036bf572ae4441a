// kv_append: row n of sequence b -> slot seq_lens[b] + node_offset + n of the K and V pages.
//
// One threadgroup per row, of K or of V; its threads copy the row's words side by side. Grid
// [nodes, batch, 2]. Bytes: 2 * B * N * Hkv * D * s read and as many written. Rows whose slot does
// not exist are skipped.
#include "pages.h"
#include "word.h"

struct KvAppendParams {
  PageTable table;
  long k_stride[3], v_stride[3];  // of b, n, head, in words
  long heads, head_words;
  long node_offset, nodes, has_num_nodes;
};

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
  if (p.has_num_nodes && n >= num_nodes[b]) return;
  const long row = row_of_slot(block_table, p.table, b, seq_lens[b] + p.node_offset + n);
  if (row < 0) return;
  const bool is_v = group.z == 1;
  device const Word* from =
      is_v ? v + b * p.v_stride[0] + n * p.v_stride[1] : k + b * p.k_stride[0] + n * p.k_stride[1];
  const long head_stride = is_v ? p.v_stride[2] : p.k_stride[2];
  device Word* to = (is_v ? v_pages : k_pages) + row * p.heads * p.head_words;
  for (long w = tid; w < p.heads * p.head_words; w += threads.x) {
    const long head = w / p.head_words;
    to[w] = from[head * head_stride + (w - head * p.head_words)];
  }
}
