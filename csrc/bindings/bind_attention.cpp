#include <string>

#include "bind.h"
#include "block_table.h"
#include "inferlab/attention.h"
#include "op.h"

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
                  const PagedLayout& layout) {
  check_seq_lens(seq_lens);
  check_num_nodes(p.num_nodes, p.batch, p.nodes);
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

// What the size of the workspace depends on too.
AttentionParams attention_shapes(const Tensor& q, const Tensor& k_pages, const Tensor& table,
                                 DType dtype, PageFormat format) {
  AttentionParams p{};
  p.batch = q.size(0);
  p.nodes = q.size(1);
  p.q_heads = q.size(2);
  p.kv_heads = k_pages.size(2);
  p.head_dim = q.size(3);
  p.pages = k_pages.size(0);
  p.max_pages = table.size(1);
  p.page_size = paged_layout(k_pages).page_size;
  p.dtype = dtype;
  p.format = format;
  require(p.head_dim >= 8 && p.head_dim <= kMaxHeadDim && p.head_dim % 8 == 0, [&] {
    return "q has head dimension " + std::to_string(p.head_dim) +
           "; it must be a multiple of 8 in [8, 256]";
  });
  require(p.kv_heads > 0 && p.q_heads % p.kv_heads == 0, [&] {
    return "q has " + std::to_string(p.q_heads) + " heads and k_pages " +
           std::to_string(p.kv_heads) + "; query heads must be a multiple of the KV heads";
  });
  return p;
}

// On the CPU threads keep their own; on Metal a threadgroup goes over all keys of its rows.
int64_t workspace_bytes(const AttentionParams& p, const Place& place) {
#if defined(INFERLAB_WITH_CUDA)
  if (place.kind == Place::kCuda && p.batch > 0 && p.nodes > 0 && p.q_heads > 0) {
    const cuda::DeviceGuard guard(place.device);
    return cuda::attention_workspace_bytes(p);
  }
#endif
  (void)p;
  (void)place;
  return 0;
}

void attention_workspace_bytes(Call& c) {
  Dim B("B"), N("N"), Hq("Hq"), Hkv("Hkv"), D("D"), P("P"), S("page_size"), M("max_pages");
  Element T;
  Stored pages(T);
  const Arg& q = c.in("q", T, {B, N, Hq, D}).rows();
  const Arg& k_pages = c.in("k_pages", pages, {P, S, Hkv, D}).decides();
  const Arg& table = c.in("block_table", kI32, {B, M}).rows();
  if (!c.ready()) return;
  c.answer(workspace_bytes(attention_shapes(q, k_pages, table, T, pages.format()), c.place()));
}

void paged_tree_attention(Call& c) {
  Dim B("B"), N("N"), Hq("Hq"), Hkv("Hkv"), D("D"), P("P"), S("page_size"), M("max_pages");
  Dim words("W");
  Element T;
  Stored pages(T);
  const Arg& q = c.in("q", T, {B, N, Hq, D}).rows();
  const Arg& k_pages = c.in("k_pages", pages, {P, S, Hkv, D}).decides();
  const Arg& v_pages = c.in("v_pages", pages, {P, S, Hkv, D});
  const Arg& table = c.in("block_table", kI32, {B, M}).rows();
  const Arg& seq_lens = c.in("seq_lens", kI32, {B});
  const Arg& ancestors = c.in("ancestors", kI64, {B, N, words}).optional();
  const Arg& num_nodes = c.in("num_nodes", kI32, {B}).optional();
  const Arg& out = c.out("out", T, {B, N, Hq, D});
  const double scale = c.number("scale");
  const int64_t window = c.integer("window");
  const double softcap = c.number("softcap");
  const int64_t node_offset = c.integer("node_offset");
  Arg& workspace = c.workspace();
  if (!c.ready()) return;
  require(window >= 0 && softcap >= 0.0, [&] {
    return "window is " + std::to_string(window) + ", softcap " + std::to_string(softcap) +
           "; each must be >= 0 (0: off)";
  });
  check_offset(node_offset);
  AttentionParams p = attention_shapes(q, k_pages, table, T, pages.format());
  p.q = q.data();
  for (int i = 0; i < 3; ++i) p.q_stride[i] = q.stride(i);
  p.k_pages = k_pages.data();
  p.v_pages = v_pages.data();
  p.block_table = table.ptr<const int32_t>();
  p.table_stride = table.stride(0);
  p.seq_lens = seq_lens.ptr<const int32_t>();
  p.ancestors = ancestors.ptr<const uint64_t>();
  p.words = words;
  p.num_nodes = num_nodes.ptr<const int32_t>();
  p.out = out.data();
  p.node_offset = node_offset;
  p.window = window;
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  if (c.on_cpu()) check_values(p, table, seq_lens, paged_layout(k_pages));
  if (out.numel() == 0) return;
  if (!c.on_cpu()) {
    for (const Tensor* t : {&k_pages, &v_pages, &out}) Call::check_aligned(*t);
  }
  void* scratch = c.on_cuda() ? c.reserve(workspace, workspace_bytes(p, c.place())) : nullptr;
  c.cpu([&] { return cpu::paged_tree_attention(p); });
  c.cuda([&](void* stream) { return cuda::paged_tree_attention(p, scratch, stream); });
  // Channels per lane; the smallest number that fits is compiled.
  const int64_t chunks = D <= 2 * kMetalSimd ? 2 : D <= 4 * kMetalSimd ? 4 : 8;
  const int64_t rows = N * (Hq / Hkv);
  c.metal(p, {(rows + kMetalAttentionRows - 1) / kMetalAttentionRows, Hkv, B},
          {{"ELEMENT", p.dtype}, {"HEAD_CHUNKS", chunks}});
}

}  // namespace

void bind_attention(py::module_& m) {
  define_query(m, "attention_workspace_bytes", attention_workspace_bytes);
  define(m, "paged_tree_attention", paged_tree_attention);
}

}  // namespace inferlab
