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

// The values behind the pointers, where the host can read them.
void check_values(const AttentionParams& p, const Tensor& table, const Tensor& seq_lens,
                  const OptionalTensor& num_nodes, const PagedLayout& layout) {
  check_seq_lens(seq_lens, p.batch);
  check_num_nodes(num_nodes, p.batch, p.nodes);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t count = p.num_nodes != nullptr ? p.num_nodes[b] : p.nodes;
    if (count == 0) continue;
    if (p.ancestors != nullptr) check_ancestors(p, b, count);
    // The first position any row sees: the shallowest row's window starts there.
    const int64_t first_end = p.seq_lens[b] + (p.ancestors != nullptr ? 1 : p.node_offset + 1);
    const int64_t begin = p.window > 0 && first_end > p.window ? first_end - p.window : 0;
    check_slots(table, b, begin, p.seq_lens[b] + p.node_offset + count, layout);
  }
}

// Kernels on CUDA move 16 bytes at a time.
void check_aligned(const Tensor& t) {
  require(reinterpret_cast<uintptr_t>(t.data()) % 16 == 0, [&] {
    return std::string(t.name()) + " starts at an address that is no multiple of 16 bytes; it must";
  });
}

AttentionParams attention_shapes(const Tensor& q, const Tensor& k_pages, const Tensor& table) {
  q.dims(4).last_dim_contiguous();
  k_pages.dims(4).contiguous();
  const PagedLayout layout = paged_layout(k_pages);
  const int64_t dim = q.size(3), q_heads = q.size(2), kv_heads = k_pages.size(2);
  k_pages.shape({Tensor::kAny, Tensor::kAny, Tensor::kAny, dim});
  check_same_dtype(q, k_pages);
  if (dim < 8 || dim > 256 || dim % 8 != 0) {
    throw py::value_error("q has head dimension " + std::to_string(dim) +
                          "; it must be a multiple of 8 in [8, 256]");
  }
  if (kv_heads == 0 || q_heads % kv_heads != 0) {
    throw py::value_error("q has " + std::to_string(q_heads) + " heads and k_pages " +
                          std::to_string(kv_heads) +
                          "; query heads must be a multiple of the KV heads");
  }
  table.i32().shape({q.size(0), Tensor::kAny}).last_dim_contiguous();
  AttentionParams p{};
  p.batch = q.size(0);
  p.nodes = q.size(1);
  p.q_heads = q_heads;
  p.kv_heads = kv_heads;
  p.head_dim = dim;
  p.pages = layout.pages;
  p.max_pages = table.size(1);
  p.page_size = layout.page_size;
  p.dtype = k_pages.float_dtype();
  return p;
}

int64_t workspace_bytes(const AttentionParams& p, const Place& place) {
#if defined(INFERLAB_WITH_CUDA)
  if (place.cuda && p.batch > 0 && p.nodes > 0 && p.q_heads > 0) {
    const cuda::DeviceGuard guard(place.device);
    return cuda::attention_workspace_bytes(p);
  }
#endif
  (void)p;
  (void)place;
  return 0;
}

// Bytes of the `workspace` that paged_tree_attention needs for these tensors; 0: None will do.
int64_t attention_workspace_bytes(py::handle q_, py::handle k_pages_, py::handle block_table_) {
  const Tensor q(q_, "q"), k_pages(k_pages_, "k_pages"), table(block_table_, "block_table");
  return workspace_bytes(attention_shapes(q, k_pages, table), q.place());
}

void paged_tree_attention(py::handle q_, py::handle k_pages_, py::handle v_pages_,
                          py::handle block_table_, py::handle seq_lens_, py::handle ancestors_,
                          py::handle out_, double scale, int64_t window, double softcap,
                          int64_t node_offset, py::handle num_nodes_, py::handle workspace_) {
  Tensor q(q_, "q"), k_pages(k_pages_, "k_pages"), v_pages(v_pages_, "v_pages");
  Tensor table(block_table_, "block_table"), seq_lens(seq_lens_, "seq_lens"), out(out_, "out");
  OptionalTensor ancestors(ancestors_, "ancestors"), num_nodes(num_nodes_, "num_nodes");
  OptionalTensor workspace(workspace_, "workspace");
  const Place place = q.place();
  for (const Tensor* t : {&k_pages, &v_pages, &table, &seq_lens, &out}) t->on(place);
  for (const OptionalTensor* t : {&ancestors, &num_nodes, &workspace}) {
    if (*t) (*t)->on(place);
  }
  AttentionParams p = attention_shapes(q, k_pages, table);
  const PagedLayout layout = paged_layout(k_pages);
  v_pages.shape({p.pages, p.page_size, p.kv_heads, p.head_dim}).contiguous();
  check_same_dtype(v_pages, k_pages);
  out.shape({p.batch, p.nodes, p.q_heads, p.head_dim}).contiguous();
  check_same_dtype(out, k_pages);
  seq_lens.i32().shape({p.batch}).contiguous();
  if (num_nodes) num_nodes->i32().shape({p.batch}).contiguous();
  if (window < 0 || !(softcap >= 0.0) || node_offset < 0) {
    throw py::value_error("window is " + std::to_string(window) + ", softcap " +
                          std::to_string(softcap) + ", node_offset " + std::to_string(node_offset) +
                          "; each must be >= 0 (0: off)");
  }
  p.q = q.data();
  for (int i = 0; i < 3; ++i) p.q_stride[i] = q.stride(i);
  p.k_pages = k_pages.data();
  p.v_pages = v_pages.data();
  p.block_table = table.ptr<const int32_t>();
  p.table_stride = table.stride(0);
  p.seq_lens = seq_lens.ptr<const int32_t>();
  p.num_nodes = num_nodes.ptr<const int32_t>();
  p.out = out.data();
  p.node_offset = node_offset;
  p.window = window;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  if (ancestors) {
    ancestors->i64().shape({p.batch, p.nodes, Tensor::kAny}).contiguous();
    p.words = ancestors->size(2);
    p.ancestors = ancestors.ptr<const uint64_t>();
  }
  if (!place.cuda) check_values(p, table, seq_lens, num_nodes, layout);
  if (out.numel() == 0) return;
  if (place.cuda) {
    for (const Tensor* t : {&k_pages, &v_pages, &out}) check_aligned(*t);
    const int64_t needed = workspace_bytes(p, place);
    const int64_t given = workspace ? workspace->u8().contiguous().numel() : 0;
    require(given >= needed, [&] {
      return "workspace has " + std::to_string(given) + " bytes; it must have at least " +
             std::to_string(needed) + " (attention_workspace)";
    });
    if (workspace) check_aligned(*workspace);
    run_cuda(q_, place, "paged_tree_attention", [&](void* stream) {
      return cuda::paged_tree_attention(p, workspace.ptr<void>(), stream);
    });
    return;
  }
  run_cpu("paged_tree_attention", [&] { return cpu::paged_tree_attention(p); });
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_workspace_bytes", &attention_workspace_bytes);
  m.def("paged_tree_attention", &paged_tree_attention);
}

}  // namespace inferlab
