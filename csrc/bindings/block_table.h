// What pages and block tables must satisfy before an op follows them. Values are checked on the CPU
// only, over the part that is used: on a device they stay there, and its kernels skip what does not
// exist.
#pragma once

#include <cstdint>
#include <string>

#include "tensor.h"

namespace inferlab {

struct PagedLayout {
  int64_t pages, page_size;
  int page_shift;
};

// The page count and size of a [.., P, page_size, Hkv, D] tensor.
inline PagedLayout paged_layout(const Tensor& t) {
  const int64_t pages = t.size(t.ndim() - 4);
  const int64_t page_size = t.size(t.ndim() - 3);
  if (page_size <= 0 || (page_size & (page_size - 1)) != 0) {
    throw py::value_error(std::string(t.name()) + " has page size " + std::to_string(page_size) +
                          " (shape " + t.shape_str() + "); it must be a power of two");
  }
  return {pages, page_size, __builtin_ctzll(static_cast<uint64_t>(page_size))};
}

inline void check_seq_lens(const Tensor& seq_lens) {
  for (int64_t b = 0; b < seq_lens.size(0); ++b) {
    if (seq_lens.ptr<const int32_t>()[b] < 0) {
      throw py::value_error("seq_lens[" + std::to_string(b) + "] is " +
                            std::to_string(seq_lens.ptr<const int32_t>()[b]) + "; it must be >= 0");
    }
  }
}

// Rows of each sequence that count: null (all) or [B] in [0, rows].
inline void check_num_nodes(const int32_t* num_nodes, int64_t batch, int64_t rows) {
  if (num_nodes == nullptr) return;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t n = num_nodes[b];
    if (n < 0 || n > rows) {
      throw py::value_error("num_nodes[" + std::to_string(b) + "] is " + std::to_string(n) +
                            "; it must be in [0, " + std::to_string(rows) + "]");
    }
  }
}

inline void check_offset(int64_t node_offset) {
  require(node_offset >= 0 && node_offset <= INT32_MAX, [&] {
    return "node_offset is " + std::to_string(node_offset) + "; it must be >= 0 and below 2^31";
  });
}

// Slots [begin, end) of sequence b must stand in the table, on pages in [0, P).
inline void check_slots(const Tensor& table, int64_t b, int64_t begin, int64_t end,
                        const PagedLayout& layout) {
  if (begin >= end) return;
  const int64_t capacity = table.size(1) << layout.page_shift;
  if (end > capacity) {
    throw py::value_error("block_table has " + std::to_string(table.size(1)) + " pages of " +
                          std::to_string(layout.page_size) + " slots per sequence, but slot " +
                          std::to_string(end - 1) + " of sequence " + std::to_string(b) +
                          " is used");
  }
  const int32_t* row = table.ptr<const int32_t>() + b * table.stride(0);
  const auto pages = static_cast<uint32_t>(layout.pages);
  bool bad = false;
  const int64_t last = (end - 1) >> layout.page_shift;
  for (int64_t i = begin >> layout.page_shift; i <= last; ++i) {
    bad |= static_cast<uint32_t>(row[i]) >= pages;
  }
  if (!bad) return;
  for (int64_t i = begin >> layout.page_shift; i <= last; ++i) {
    if (static_cast<uint32_t>(row[i]) >= pages) {
      throw py::value_error("block_table[" + std::to_string(b) + ", " + std::to_string(i) +
                            "] is " + std::to_string(row[i]) + "; a used page must be in [0, " +
                            std::to_string(layout.pages) + ")");
    }
  }
}

// Where the new rows of each sequence go, or those that count: slots behind the committed ones.
template <typename Params>
void check_new_rows(const Tensor& table, const Tensor& seq_lens, const Params& p,
                    const PagedLayout& layout) {
  check_seq_lens(seq_lens);
  check_num_nodes(p.num_nodes, p.batch, p.nodes);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t first = p.seq_lens[b] + p.node_offset;
    const int64_t count = p.num_nodes != nullptr ? p.num_nodes[b] : p.nodes;
    check_slots(table, b, first, first + count, layout);
  }
}

}  // namespace inferlab
