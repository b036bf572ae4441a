#include <algorithm>
#include <vector>

#include "bind.h"
#include "block_table.h"
#include "inferlab/kv.h"
#include "tensor.h"

namespace inferlab {
namespace {

// Pages [P, page_size, Hkv, D] or, with `layers`, a cache [L, P, page_size, Hkv, D].
void check_pool(const Tensor& pool, bool layers) {
  pool.dims(layers ? 5 : 4).contiguous();
  pool.float_dtype();
}

void check_same(const Tensor& t, const Tensor& like) {
  check_same_dtype(t, like);
  bool same = t.ndim() == like.ndim();
  for (int i = 0; same && i < t.ndim(); ++i) same = t.size(i) == like.size(i);
  require(same, [&] {
    return std::string(t.name()) + " has shape " + t.shape_str() + "; it must be that of " +
           like.name() + ", " + like.shape_str();
  });
}

void kv_append(py::handle k_, py::handle v_, py::handle k_pages_, py::handle v_pages_,
               py::handle block_table_, py::handle seq_lens_, int64_t node_offset,
               py::handle num_nodes_) {
  Tensor k(k_, "k"), v(v_, "v"), k_pages(k_pages_, "k_pages"), v_pages(v_pages_, "v_pages");
  Tensor table(block_table_, "block_table"), seq_lens(seq_lens_, "seq_lens");
  OptionalTensor num_nodes(num_nodes_, "num_nodes");
  const Place place = k.place();
  check_pool(k_pages, false);
  k_pages.on(place);
  v_pages.contiguous().on(place);
  check_same(v_pages, k_pages);
  const PagedLayout layout = paged_layout(k_pages);
  const int64_t heads = k_pages.size(2), dim = k_pages.size(3);
  k.dims(4).shape({Tensor::kAny, Tensor::kAny, heads, dim}).last_dim_contiguous();
  const int64_t batch = k.size(0), nodes = k.size(1);
  v.shape({batch, nodes, heads, dim}).last_dim_contiguous().on(place);
  check_same_dtype(k, k_pages);
  check_same_dtype(v, k_pages);
  check_block_table(table, batch, place);
  check_seq_lens(seq_lens, batch, place);
  check_num_nodes(num_nodes, batch, nodes, place);
  require(node_offset >= 0,
          [&] { return "node_offset is " + std::to_string(node_offset) + "; it must be >= 0"; });
  const int64_t s = dtype_size(k_pages.float_dtype());
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
  p.batch = batch;
  p.nodes = nodes;
  p.heads = heads;
  p.pages = layout.pages;
  p.page_size = layout.page_size;
  p.max_pages = table.size(1);
  p.node_offset = node_offset;
  p.head_bytes = dim * s;
  if (nodes == 0 || batch == 0 || heads * dim == 0) return;
  if (place.cuda) {
    run_cuda(k_, place, "kv_append", [&](void* stream) { return cuda::kv_append(p, stream); });
    return;
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = p.seq_lens[b] + node_offset;
    check_slots(table, b, first, first + (p.num_nodes != nullptr ? p.num_nodes[b] : nodes), layout);
  }
  run_cpu("kv_append", [&] { return cpu::kv_append(p); });
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

void kv_compact(py::handle k_cache_, py::handle v_cache_, py::handle block_table_,
                py::handle seq_lens_, py::handle accepted_, py::handle num_accepted_) {
  Tensor k_cache(k_cache_, "k_cache"), v_cache(v_cache_, "v_cache");
  Tensor table(block_table_, "block_table"), seq_lens(seq_lens_, "seq_lens");
  Tensor accepted(accepted_, "accepted_nodes"), num_accepted(num_accepted_, "num_accepted");
  const Place place = k_cache.place();
  check_pool(k_cache, true);
  v_cache.contiguous().on(place);
  check_same(v_cache, k_cache);
  const PagedLayout layout = paged_layout(k_cache);
  table.dims(2);
  const int64_t batch = table.size(0);
  check_block_table(table, batch, place);
  check_seq_lens(seq_lens, batch, place);
  accepted.i32().shape({batch, Tensor::kAny}).contiguous().on(place);
  num_accepted.i32().shape({batch}).contiguous().on(place);
  KvCompactParams p{};
  p.k_cache = k_cache.ptr<char>();
  p.v_cache = v_cache.ptr<char>();
  p.block_table = table.ptr<const int32_t>();
  p.table_stride = table.stride(0);
  p.seq_lens = seq_lens.ptr<const int32_t>();
  p.accepted = accepted.ptr<const int32_t>();
  p.num_accepted = num_accepted.ptr<const int32_t>();
  p.layers = k_cache.size(0);
  p.pages = layout.pages;
  p.page_size = layout.page_size;
  p.max_pages = table.size(1);
  p.batch = batch;
  p.steps = accepted.size(1);
  p.row_bytes = k_cache.size(3) * k_cache.size(4) * dtype_size(k_cache.float_dtype());
  if (place.cuda) {
    run_cuda(k_cache_, place, "kv_compact",
             [&](void* stream) { return cuda::kv_compact(p, stream); });
    return;
  }
  check_accepted(p, table, layout);
  if (p.row_bytes == 0) return;
  run_cpu("kv_compact", [&] { return cpu::kv_compact(p); });
}

void kv_gather(py::handle pages_, py::handle block_table_, py::handle seq_lens_, py::handle out_) {
  Tensor pages(pages_, "pages"), table(block_table_, "block_table");
  Tensor seq_lens(seq_lens_, "seq_lens"), out(out_, "out");
  const Place place = pages.place();
  check_pool(pages, false);
  const PagedLayout layout = paged_layout(pages);
  table.dims(2);
  const int64_t batch = table.size(0);
  check_block_table(table, batch, place);
  check_seq_lens(seq_lens, batch, place);
  out.shape({batch, Tensor::kAny, pages.size(2), pages.size(3)}).contiguous().on(place);
  check_same_dtype(out, pages);
  KvGatherParams p{};
  p.pages = pages.ptr<const char>();
  p.block_table = table.ptr<const int32_t>();
  p.table_stride = table.stride(0);
  p.seq_lens = seq_lens.ptr<const int32_t>();
  p.out = out.ptr<char>();
  p.batch = batch;
  p.max_len = out.size(1);
  p.num_pages = layout.pages;
  p.page_size = layout.page_size;
  p.max_pages = table.size(1);
  p.row_bytes = pages.size(2) * pages.size(3) * dtype_size(pages.float_dtype());
  if (place.cuda) {
    run_cuda(pages_, place, "kv_gather", [&](void* stream) { return cuda::kv_gather(p, stream); });
    return;
  }
  for (int64_t b = 0; b < batch; ++b) {
    require(p.seq_lens[b] <= p.max_len, [&] {
      return "seq_lens[" + std::to_string(b) + "] is " + std::to_string(p.seq_lens[b]) +
             "; it must be at most max_len, " + std::to_string(p.max_len);
    });
    check_slots(table, b, 0, p.seq_lens[b], layout);
  }
  if (out.numel() == 0) return;
  run_cpu("kv_gather", [&] { return cpu::kv_gather(p); });
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

void kv_copy_pages(py::handle k_cache_, py::handle v_cache_, py::handle src_, py::handle dst_) {
  Tensor k_cache(k_cache_, "k_cache"), v_cache(v_cache_, "v_cache");
  Tensor src(src_, "src"), dst(dst_, "dst");
  const Place place = k_cache.place();
  for (const Tensor* t : {&v_cache, &src, &dst}) t->on(place);
  check_pool(k_cache, true);
  v_cache.contiguous();
  check_same(v_cache, k_cache);
  const PagedLayout layout = paged_layout(k_cache);
  src.i32().dims(1).contiguous();
  dst.i32().shape({src.size(0)}).contiguous();
  KvCopyPagesParams p{};
  p.k_cache = k_cache.ptr<char>();
  p.v_cache = v_cache.ptr<char>();
  p.src = src.ptr<const int32_t>();
  p.dst = dst.ptr<const int32_t>();
  p.layers = k_cache.size(0);
  p.pages = layout.pages;
  p.moves = src.size(0);
  p.page_bytes =
      layout.page_size * k_cache.size(3) * k_cache.size(4) * dtype_size(k_cache.float_dtype());
  if (k_cache.numel() == 0) return;
  if (place.cuda) {
    run_cuda(k_cache_, place, "kv_copy_pages",
             [&](void* stream) { return cuda::kv_copy_pages(p, stream); });
    return;
  }
  check_moves(p);
  run_cpu("kv_copy_pages", [&] { return cpu::kv_copy_pages(p); });
}

}  // namespace

void bind_kv(py::module_& m) {
  m.def("kv_append", &kv_append);
  m.def("kv_compact", &kv_compact);
  m.def("kv_gather", &kv_gather);
  m.def("kv_copy_pages", &kv_copy_pages);
}

}  // namespace inferlab
