// rope_append: rotates q in place and writes rotated k, and v, to the pages (Su et al., 2021, with
// the halves of the first `rotary` channels as pairs).
//
// One threadgroup per token; grid [nodes, batch]. A thread takes pairs (i, i + rotary / 2), then
// channels that are only copied. Bytes: B * N * (Hq + 2 * Hkv) * D elements read and written.
// Tokens whose slot does not exist are not written; their q is rotated.
#include "element.h"
#include "inferlab/layer.h"
#include "pages.h"

// Products are rounded to the element type, as they are where the layer is not fused.
inline float product(Element a, Element b) { return rounded(to_float(a) * to_float(b)); }

// Pair i of a head, (a, b) -> (a cos - b sin, b cos + a sin).
inline void rotate_pair(device const Element* x, device Element* out, device const Element* cos,
                        device const Element* sin, long i, long half_width) {
  const long j = i + half_width;
  const Element a = x[i], b = x[j];
  out[i] = to_element(product(a, cos[i]) - product(b, sin[i]));
  out[j] = to_element(product(b, cos[j]) + product(a, sin[j]));
}

kernel void rope_append(
    device Element* q [[buffer(0)]], device const Element* k [[buffer(1)]],
    device const Element* v [[buffer(2)]], device const Element* cos [[buffer(3)]],
    device const Element* sin [[buffer(4)]], device Element* k_pages [[buffer(5)]],
    device Element* v_pages [[buffer(6)]], device const int* block_table [[buffer(7)]],
    device const int* seq_lens [[buffer(8)]], device const int* num_nodes [[buffer(9)]],
    constant RopeAppendParams& p [[buffer(10)]], uint3 group [[threadgroup_position_in_grid]],
    uint3 threads [[threads_per_threadgroup]], uint tid [[thread_index_in_threadgroup]]) {
  const long n = group.x, b = group.y;
  if (p.num_nodes != 0 && n >= num_nodes[b]) return;
  const long half_width = p.rotary / 2, rest = p.head_dim - p.rotary;
  cos += b * p.cos_stride + n * p.rotary;
  sin += b * p.cos_stride + n * p.rotary;
  q += b * p.q_stride[0] + n * p.q_stride[1];
  for (long i = tid; i < p.q_heads * half_width; i += threads.x) {
    device Element* head = q + i / half_width * p.head_dim;
    rotate_pair(head, head, cos, sin, i % half_width, half_width);
  }
  const long row = row_of_slot(block_table, p, b, seq_lens[b] + p.node_offset + n);
  if (row < 0) return;
  k += b * p.k_stride[0] + n * p.k_stride[1];
  v += b * p.v_stride[0] + n * p.v_stride[1];
  device Element* k_out = k_pages + row * p.kv_heads * p.head_dim;
  device Element* v_out = v_pages + row * p.kv_heads * p.head_dim;
  for (long i = tid; i < p.kv_heads * half_width; i += threads.x) {
    const long head = i / half_width * p.head_dim;
    rotate_pair(k + head, k_out + head, cos, sin, i % half_width, half_width);
  }
  for (long i = tid; i < p.kv_heads * rest; i += threads.x) {
    const long at = i / rest * p.head_dim + p.rotary + i % rest;
    k_out[at] = k[at];
  }
  for (long i = tid; i < p.kv_heads * p.head_dim; i += threads.x) v_out[i] = v[i];
}
