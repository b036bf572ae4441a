#include <algorithm>
#include <vector>

#include "bind.h"
#include "block_table.h"
#include "inferlab/kv.h"
#include "op.h"

namespace inferlab {
namespace {

// Bytes that Metal's kernels move at a time: 16 where every address and every size allows it.
int64_t word(std::initializer_list<const Tensor*> tensors, std::initializer_list<int64_t> bytes) {
  bool wide = true;
  for (const Tensor* t : tensors) wide = wide && reinterpret_cast<uintptr_t>(t->data()) % 16 == 0;
  for (const int64_t n : bytes) wide = wide && n % 16 == 0;
  return wide ? 16 : 2;
}

void kv_append(Call& c) {
  Dim B("B"), N("N"), H("Hkv"), D("D"), P("P"), S("page_size"), M("max_pages");
  Element T;
  Stored pages(T);
  const Arg& k = c.in("k", T, {B, N, H, D}).rows();
  const Arg& v = c.in("v", T, {B, N, H, D}).rows();
  const Arg& k_pages = c.out("k_pages", pages, {P, S, H, D}).decides();
  const Arg& v_pages = c.out("v_pages", pages, {P, S, H, D});
  const Arg& table = c.in("block_table", kI32, {B, M}).rows();
  const Arg& seq_lens = c.in("seq_lens", kI32, {B});
  const int64_t node_offset = c.integer("node_offset");
  const Arg& num_nodes = c.in("num_nodes", kI32, {B}).optional();
  if (!c.ready()) return;
  const PagedLayout layout = paged_layout(k_pages);
  check_offset(node_offset);
  const int64_t s = dtype_size(T);
  KvAppendParams p{};
  p.k = k.ptr<const char>();
  p.v = v.ptr<const char>();
  for (int i = 0; i < 3; ++i) {
    p.k_stride_bytes[i] = k.stride(i) * s;
    p.v_stride_bytes[i] = v.stride(i) * s;
  }
  p.k_pages = k_pages.ptr<char>();
  p.v_pages = v_pages.ptr<char>();
  p.block_table = table.ptr<const int32_t>();
  p.table_stride = table.stride(0);
  p.seq_lens = seq_lens.ptr<const int32_t>();
  p.num_nodes = num_nodes.ptr<const int32_t>();
  p.batch = B;
  p.nodes = N;
  p.heads = H;
  p.pages = P;
  p.page_size = S;
  p.max_pages = M;
  p.node_offset = node_offset;
  p.head_bytes = D * s;
  p.dtype = T;
  p.format = pages.format();
  if (c.on_cpu()) check_new_rows(table, seq_lens, p, layout);
  if (k.numel() == 0) return;
  c.cpu([&] { return cpu::kv_append(p); });
  c.cuda([&](void* stream) { return cuda::kv_append(p, stream); });
  const int64_t *ks = p.k_stride_bytes, *vs = p.v_stride_bytes;
  const auto sizes = {ks[0], ks[1], ks[2], vs[0], vs[1], vs[2], p.head_bytes};
  c.metal(p, {N, B, 2}, {{"WORD", word({&k, &v, &k_pages, &v_pages}, sizes)}});
}

// The nodes of each path increase, and stand in slots that exist.
void check_accepted(const KvCompactParams& p, const Tensor& table, const PagedLayout& layout) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t count = p.num_accepted[b];
    if (count < 0 || count > p.steps) {
      throw py::value_error("num_accepted[" + std::to_string(b) + "] is " + std::to_string(count) +
                            "; it must be in [0, " + std::to_string(p.steps) + "]");
    }
    int64_t previous = -1;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t node = p.accepted[b * p.steps + j];
      if (node <= previous) {
        throw py::value_error("accepted_nodes[" + std::to_string(b) + ", " + std::to_string(j) +
                              "] is " + std::to_string(node) + " after " +
                              std::to_string(previous) +
                              "; the nodes of a path start at >= 0 and increase");
      }
      previous = node;
    }
    check_slots(table, b, p.seq_lens[b], p.seq_lens[b] + previous + 1, layout);
  }
}

void kv_compact(Call& c) {
  Dim L("L"), P("P"), S("page_size"), H("Hkv"), D("D"), B("B"), M("max_pages"), steps("S");
  Stored T;
  const Arg& k_cache = c.out("k_cache", T, {L, P, S, H, D});
  const Arg& v_cache = c.out("v_cache", T, {L, P, S, H, D});
  const Arg& table = c.in("block_table", kI32, {B, M}).rows();
  const Arg& seq_lens = c.in("seq_lens", kI32, {B});
  const Arg& accepted = c.in("accepted_nodes", kI32, {B, steps});
  const Arg& num_accepted = c.in("num_accepted", kI32, {B});
  if (!c.ready()) return;
  const PagedLayout layout = paged_layout(k_cache);
  KvCompactParams p{};
  p.k_cache = k_cache.ptr<char>();
  p.v_cache = v_cache.ptr<char>();
  p.block_table = table.ptr<const int32_t>();
  p.table_stride = table.stride(0);
  p.seq_lens = seq_lens.ptr<const int32_t>();
  p.accepted = accepted.ptr<const int32_t>();
  p.num_accepted = num_accepted.ptr<const int32_t>();
  p.layers = L;
  p.pages = P;
  p.page_size = S;
  p.max_pages = M;
  p.batch = B;
  p.steps = steps;
  p.row_bytes = H * D * T.bytes();
  if (c.on_cpu()) {
    check_seq_lens(seq_lens);
    check_accepted(p, table, layout);
    if (p.row_bytes == 0) return;
  }
  c.cpu([&] { return cpu::kv_compact(p); });
  c.cuda([&](void* stream) { return cuda::kv_compact(p, stream); });
  const int64_t size = word({&k_cache, &v_cache}, {p.row_bytes}), words = p.row_bytes / size;
  const int64_t threads = std::max<int64_t>(32, std::min<int64_t>(64, (words + 31) / 32 * 32));
  c.metal(p, {(words + threads - 1) / threads, B, 2 * L, threads}, {{"WORD", size}});
}

void kv_gather(Call& c) {
  Dim P("P"), S("page_size"), H("Hkv"), D("D"), B("B"), M("max_pages"), max_len("max_len");
  Stored T;
  const Arg& pages = c.in("pages", T, {P, S, H, D});
  const Arg& table = c.in("block_table", kI32, {B, M}).rows();
  const Arg& seq_lens = c.in("seq_lens", kI32, {B});
  const Arg& out = c.out("out", T, {B, max_len, H, D});
  if (!c.ready()) return;
  const PagedLayout layout = paged_layout(pages);
  KvGatherParams p{};
  p.pool = pages.ptr<const char>();
  p.block_table = table.ptr<const int32_t>();
  p.table_stride = table.stride(0);
  p.seq_lens = seq_lens.ptr<const int32_t>();
  p.out = out.ptr<char>();
  p.batch = B;
  p.max_len = max_len;
  p.pages = P;
  p.page_size = S;
  p.max_pages = M;
  p.row_bytes = H * D * T.bytes();
  if (c.on_cpu()) {
    check_seq_lens(seq_lens);
    for (int64_t b = 0; b < B; ++b) {
      require(p.seq_lens[b] <= max_len, [&] {
        return "seq_lens[" + std::to_string(b) + "] is " + std::to_string(p.seq_lens[b]) +
               "; it must be at most max_len, " + std::to_string(max_len);
      });
      check_slots(table, b, 0, p.seq_lens[b], layout);
    }
    if (out.numel() == 0) return;
  }
  c.cpu([&] { return cpu::kv_gather(p); });
  c.cuda([&](void* stream) { return cuda::kv_gather(p, stream); });
  c.metal(p, {max_len, B, 1, 64}, {{"WORD", word({&pages, &out}, {p.row_bytes})}});
}

void check_moves(const KvCopyPagesParams& p) {
  for (int64_t i = 0; i < p.moves; ++i) {
    for (const int32_t* ids : {p.src, p.dst}) {
      if (ids[i] < 0 || ids[i] >= p.pages) {
        throw py::value_error(std::string(ids == p.src ? "src[" : "dst[") + std::to_string(i) +
                              "] is " + std::to_string(ids[i]) + "; a page must be in [0, " +
                              std::to_string(p.pages) + ")");
      }
    }
  }
  if (p.moves < 2) return;
  std::vector<int32_t> written(p.dst, p.dst + p.moves);
  std::sort(written.begin(), written.end());
  const auto twice = std::adjacent_find(written.begin(), written.end());
  require(twice == written.end(), [&] {
    return "dst has page " + std::to_string(*twice) + " twice; a page may be written once";
  });
  for (int64_t i = 0; i < p.moves; ++i) {
    const bool read = p.src[i] != p.dst[i];
    require(!read || !std::binary_search(written.begin(), written.end(), p.src[i]), [&] {
      return "src[" + std::to_string(i) + "] is page " + std::to_string(p.src[i]) +
             ", which is in dst too; a page may not be read and written in one call";
    });
  }
}

void kv_copy_pages(Call& c) {
  Dim L("L"), P("P"), S("page_size"), H("Hkv"), D("D"), moves("M");
  Stored T;
  const Arg& k_cache = c.out("k_cache", T, {L, P, S, H, D});
  const Arg& v_cache = c.out("v_cache", T, {L, P, S, H, D});
  const Arg& src = c.in("src", kI32, {moves});
  const Arg& dst = c.in("dst", kI32, {moves});
  if (!c.ready()) return;
  const PagedLayout layout = paged_layout(k_cache);
  KvCopyPagesParams p{};
  p.k_cache = k_cache.ptr<char>();
  p.v_cache = v_cache.ptr<char>();
  p.src = src.ptr<const int32_t>();
  p.dst = dst.ptr<const int32_t>();
  p.layers = L;
  p.pages = P;
  p.moves = moves;
  p.page_bytes = layout.page_size * H * D * T.bytes();
  if (k_cache.numel() == 0) return;
  if (c.on_cpu()) check_moves(p);
  c.cpu([&] { return cpu::kv_copy_pages(p); });
  c.cuda([&](void* stream) { return cuda::kv_copy_pages(p, stream); });
  const int64_t size = word({&k_cache, &v_cache}, {p.page_bytes});
  const int64_t per_group = size * kMetalThreads * kMetalCopiedWords;
  c.metal(p, {(p.page_bytes + per_group - 1) / per_group, moves, 2 * L}, {{"WORD", size}});
}

}  // namespace

void bind_kv(py::module_& m) {
  define(m, "kv_append", kv_append);
  define(m, "kv_compact", kv_compact);
  define(m, "kv_gather", kv_gather);
  define(m, "kv_copy_pages", kv_copy_pages);
}

}  // namespace inferlab
