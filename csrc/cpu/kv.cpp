// The KV ops on the CPU: who moves which bytes. Tasks are runs of whole rows, so that neighbouring
// lines are written by one thread.
//
//   kv_append      2 * B * N * Hkv * D * s read and as many written
//   kv_compact     2 * L * moved rows * Hkv * D * s read and written
//   kv_gather      B * seq_len rows read, B * max_len rows written
//   kv_copy_pages  2 * L * M * page bytes read and written
#include "inferlab/kv.h"

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "parallel.h"

namespace inferlab::cpu {

INFERLAB_DECLARE_KERNEL(void, copy_bytes, char*, const char*, int64_t, bool)
INFERLAB_DECLARE_KERNEL(void, write_row, const KvAppendParams&, const void*, int64_t, char*)
INFERLAB_DECLARE_KERNEL(void, finish_stores)

namespace {

// Above this a result would push everything else out of a private cache: stream it.
constexpr int64_t kStreamBytes = 4 << 20;
constexpr int64_t kTaskBytes = 256 << 10;

int shift_of(int64_t power_of_two) { return __builtin_ctzll(static_cast<uint64_t>(power_of_two)); }

// Byte offset of a slot inside the pages.
int64_t slot_offset(const int32_t* table_row, int64_t slot, int page_shift, int64_t row_bytes) {
  const int64_t page = table_row[slot >> page_shift];
  return ((page << page_shift) + (slot & ((int64_t{1} << page_shift) - 1))) * row_bytes;
}

}  // namespace

Status kv_append(const KvAppendParams& p) {
  const int64_t element = dtype_size(p.dtype);
  const int64_t row_bytes = p.heads * page_head_bytes(p.format, p.head_bytes / element, p.dtype);
  const int64_t total = 2 * p.batch * p.nodes * p.heads * p.head_bytes;
  const bool streaming = total >= kStreamBytes;
  const int shift = shift_of(p.page_size);
  const int64_t per_task = std::max<int64_t>(1, kTaskBytes / (2 * row_bytes));
  const int64_t spans = (p.nodes + per_task - 1) / per_task;
  const auto copy = [&](char* dst, const char* src, int64_t head_stride) {
    if (p.format != PageFormat::kSame) {
      INFERLAB_DISPATCH(write_row, p, src, head_stride / element, dst);
      return;
    }
    if (head_stride == p.head_bytes) {
      INFERLAB_DISPATCH(copy_bytes, dst, src, row_bytes, streaming);
      return;
    }
    for (int64_t h = 0; h < p.heads; ++h) {
      std::memcpy(dst + h * p.head_bytes, src + h * head_stride, static_cast<size_t>(p.head_bytes));
    }
  };
  const auto task = [&](int64_t t) {
    const int64_t b = t / spans;
    const int64_t begin = (t % spans) * per_task;
    const int64_t count = p.num_nodes != nullptr ? p.num_nodes[b] : p.nodes;
    const int64_t end = std::min(begin + per_task, count);
    const int32_t* table = p.block_table + b * p.table_stride;
    const int64_t first_slot = p.seq_lens[b] + p.node_offset;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t offset = slot_offset(table, first_slot + n, shift, row_bytes);
      copy(p.k_pages + offset, p.k + b * p.k_stride_bytes[0] + n * p.k_stride_bytes[1],
           p.k_stride_bytes[2]);
      copy(p.v_pages + offset, p.v + b * p.v_stride_bytes[0] + n * p.v_stride_bytes[1],
           p.v_stride_bytes[2]);
    }
    if (streaming) INFERLAB_DISPATCH(finish_stores);
  };
  parallel_for(p.batch * spans, total, [&task](int64_t t) { task(t); });
  return Status::kOk;
}

Status kv_compact(const KvCompactParams& p) {
  const int shift = shift_of(p.page_size);
  const int64_t layer_bytes = p.pages * p.page_size * p.row_bytes;
  int64_t moved = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t j = 0; j < p.num_accepted[b]; ++j) moved += p.accepted[b * p.steps + j] != j;
  }
  if (moved == 0) return Status::kOk;
  const auto task = [&](int64_t t) {
    char* cache = (t & 1 ? p.v_cache : p.k_cache) + (t >> 1) * layer_bytes;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int32_t* table = p.block_table + b * p.table_stride;
      const int64_t start = p.seq_lens[b];
      for (int64_t j = 0; j < p.num_accepted[b]; ++j) {
        const int64_t node = p.accepted[b * p.steps + j];
        if (node == j) continue;
        std::memcpy(cache + slot_offset(table, start + j, shift, p.row_bytes),
                    cache + slot_offset(table, start + node, shift, p.row_bytes),
                    static_cast<size_t>(p.row_bytes));
      }
    }
  };
  parallel_for(2 * p.layers, 4 * p.layers * moved * p.row_bytes, [&task](int64_t t) { task(t); });
  return Status::kOk;
}

Status kv_gather(const KvGatherParams& p) {
  const int shift = shift_of(p.page_size);
  const int64_t total = p.batch * p.max_len * p.row_bytes;
  const bool streaming = total >= kStreamBytes;
  const int64_t pages_per_task = std::max<int64_t>(1, kTaskBytes / (p.page_size * p.row_bytes));
  const int64_t per_task = pages_per_task * p.page_size;
  const int64_t spans = (p.max_len + per_task - 1) / per_task;
  const auto task = [&](int64_t t) {
    const int64_t b = t / spans;
    const int64_t begin = (t % spans) * per_task;
    const int64_t end = std::min(begin + per_task, p.max_len);
    const int64_t filled = std::min<int64_t>(end, std::max<int64_t>(begin, p.seq_lens[b]));
    const int32_t* table = p.block_table + b * p.table_stride;
    char* out = p.out + (b * p.max_len) * p.row_bytes;
    for (int64_t s = begin; s < filled; s += p.page_size) {  // begin is a page's first slot
      const int64_t rows = std::min(p.page_size, filled - s);
      INFERLAB_DISPATCH(copy_bytes, out + s * p.row_bytes,
                        p.pool + slot_offset(table, s, shift, p.row_bytes), rows * p.row_bytes,
                        streaming);
    }
    std::memset(out + filled * p.row_bytes, 0, static_cast<size_t>((end - filled) * p.row_bytes));
    if (streaming) INFERLAB_DISPATCH(finish_stores);
  };
  parallel_for(p.batch * spans, 2 * total, [&task](int64_t t) { task(t); });
  return Status::kOk;
}

Status kv_copy_pages(const KvCopyPagesParams& p) {
  const int64_t total = 2 * p.layers * p.moves * p.page_bytes;
  const bool streaming = total >= kStreamBytes;
  const int64_t layer_bytes = p.pages * p.page_bytes;
  const int64_t per_task = std::max<int64_t>(1, kTaskBytes / p.page_bytes);
  const int64_t spans = (p.moves + per_task - 1) / per_task;
  const auto task = [&](int64_t t) {
    const int64_t begin = (t % spans) * per_task;
    const int64_t end = std::min(begin + per_task, p.moves);
    const int64_t plane = t / spans;  // layer and K or V
    char* cache = (plane & 1 ? p.v_cache : p.k_cache) + (plane >> 1) * layer_bytes;
    for (int64_t i = begin; i < end; ++i) {
      if (p.src[i] == p.dst[i]) continue;
      INFERLAB_DISPATCH(copy_bytes, cache + p.dst[i] * p.page_bytes,
                        cache + p.src[i] * p.page_bytes, p.page_bytes, streaming);
    }
    if (streaming) INFERLAB_DISPATCH(finish_stores);
  };
  parallel_for(2 * p.layers * spans, 2 * total, [&task](int64_t t) { task(t); });
  return Status::kOk;
}

}  // namespace inferlab::cpu
