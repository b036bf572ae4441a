#include <string>

#include "bind.h"
#include "block_table.h"
#include "inferlab/attention.h"
#include "tensor.h"

namespace inferlab {
namespace {

// Node indices are counted from 0; `nodes` nodes have their K/V in the cache.
void check_ancestors(const AttentionParams& p, int64_t b, int64_t count) {
  const int64_t nodes = p.node_offset + count;
  for (int64_t n = 0; n < count; ++n) {
    const uint64_t* row = p.ancestors + (b * p.nodes + n) * p.words;
    uint64_t outside = 0;
    for (int64_t w = nodes / 64; w < p.words; ++w) {
      outside |= w == nodes / 64 ? row[w] >> (nodes % 64) : row[w];
    }
    if (outside != 0) {
      throw py::value_error("ancestors[" + std::to_string(b) + ", " + std::to_string(n) +
                            "] has a bit at or above " + std::to_string(nodes) +
                            ", the number of nodes of the sequence");
    }
  }
}

void paged_tree_attention(py::handle q_, py::handle k_pages_, py::handle v_pages_,
                          py::handle block_table_, py::handle seq_lens_, py::handle ancestors_,
                          py::handle out_, double scale, int64_t window, double softcap,
                          int64_t node_offset, py::handle num_nodes_) {
  Tensor q(q_, "q"), k_pages(k_pages_, "k_pages"), v_pages(v_pages_, "v_pages");
  Tensor table(block_table_, "block_table"), seq_lens(seq_lens_, "seq_lens"), out(out_, "out");
  OptionalTensor ancestors(ancestors_, "ancestors"), num_nodes(num_nodes_, "num_nodes");
  q.dims(4).last_dim_contiguous().cpu();
  k_pages.dims(4).contiguous().cpu();
  const PagedLayout layout = paged_layout(k_pages);
  const int64_t batch = q.size(0), nodes = q.size(1), q_heads = q.size(2), dim = q.size(3);
  const int64_t kv_heads = k_pages.size(2);
  k_pages.shape({Tensor::kAny, Tensor::kAny, Tensor::kAny, dim});
  v_pages.shape({layout.pages, layout.page_size, kv_heads, dim}).contiguous().cpu();
  check_same_dtype(v_pages, k_pages);
  check_same_dtype(q, k_pages);
  out.shape({batch, nodes, q_heads, dim}).contiguous().cpu();
  check_same_dtype(out, k_pages);
  if (dim < 8 || dim > 256 || dim % 8 != 0) {
    throw py::value_error("q has head dimension " + std::to_string(dim) +
                          "; it must be a multiple of 8 in [8, 256]");
  }
  if (kv_heads == 0 || q_heads % kv_heads != 0) {
    throw py::value_error("q has " + std::to_string(q_heads) + " heads and k_pages " +
                          std::to_string(kv_heads) +
                          "; query heads must be a multiple of the KV heads");
  }
  check_block_table(table, batch);
  check_seq_lens(seq_lens, batch);
  check_num_nodes(num_nodes, batch, nodes);
  if (window < 0 || !(softcap >= 0.0) || node_offset < 0) {
    throw py::value_error("window is " + std::to_string(window) + ", softcap " +
                          std::to_string(softcap) + ", node_offset " + std::to_string(node_offset) +
                          "; each must be >= 0 (0: off)");
  }
  AttentionParams p{};
  p.q = q.data();
  for (int i = 0; i < 3; ++i) p.q_stride[i] = q.stride(i);
  p.k_pages = k_pages.data();
  p.v_pages = v_pages.data();
  p.block_table = table.ptr<const int32_t>();
  p.table_stride = table.stride(0);
  p.seq_lens = seq_lens.ptr<const int32_t>();
  p.num_nodes = num_nodes.ptr<const int32_t>();
  p.out = out.data();
  p.batch = batch;
  p.nodes = nodes;
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.head_dim = dim;
  p.page_size = layout.page_size;
  p.node_offset = node_offset;
  p.window = window;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.dtype = k_pages.float_dtype();
  if (ancestors) {
    ancestors->i64().shape({batch, nodes, Tensor::kAny}).contiguous().cpu();
    p.words = ancestors->size(2);
    p.ancestors = ancestors.ptr<const uint64_t>();
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t count = p.num_nodes != nullptr ? p.num_nodes[b] : nodes;
    if (count == 0) continue;
    if (p.ancestors != nullptr) check_ancestors(p, b, count);
    // The first position any row sees: the shallowest row's window starts there.
    const int64_t first_end = p.seq_lens[b] + (p.ancestors != nullptr ? 1 : node_offset + 1);
    const int64_t begin = window > 0 && first_end > window ? first_end - window : 0;
    check_slots(table, b, begin, p.seq_lens[b] + node_offset + count, layout);
  }
  if (out.numel() == 0) return;
  py::gil_scoped_release release;
  check_status(cpu::paged_tree_attention(p), "paged_tree_attention");
}

}  // namespace

void bind_attention(py::module_& m) { m.def("paged_tree_attention", &paged_tree_attention); }

}  // namespace inferlab
