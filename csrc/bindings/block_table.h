// What pages and block tables must satisfy before an op follows them. Shapes, dtypes and devices
// are checked everywhere; values only on the CPU, over the part that is used: on a device they stay
// there, and its kernels skip what does not exist.
#pragma once

#include <string>

#include "tensor.h"

namespace inferlab {

struct PagedLayout {
  int64_t pages, page_size;
  int page_shift;
};

inline void check_same_dtype(const Tensor& t, const Tensor& like) {
  if (t.float_dtype() != like.float_dtype()) {
    throw py::type_error(std::string(t.name()) + " has dtype " + t.dtype_str() +
                         "; it must be that of " + like.name() + ", " + like.dtype_str());
  }
}

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

constexpr Place kHost{false, 0};

inline void check_block_table(const Tensor& table, int64_t batch, const Place& place = kHost) {
  table.i32().shape({batch, Tensor::kAny}).last_dim_contiguous().on(place);
}

inline void check_seq_lens(const Tensor& seq_lens, int64_t batch, const Place& place = kHost) {
  seq_lens.i32().shape({batch}).contiguous().on(place);
  if (place.cuda) return;
  for (int64_t b = 0; b < batch; ++b) {
    if (seq_lens.ptr<const int32_t>()[b] < 0) {
      throw py::value_error("seq_lens[" + std::to_string(b) + "] is " +
                            std::to_string(seq_lens.ptr<const int32_t>()[b]) + "; it must be >= 0");
    }
  }
}

// Rows of each sequence that count: null (all) or [B] i32 in [0, rows].
inline void check_num_nodes(const OptionalTensor& num_nodes, int64_t batch, int64_t rows,
                            const Place& place = kHost) {
  if (!num_nodes) return;
  num_nodes->i32().shape({batch}).contiguous().on(place);
  if (place.cuda) return;
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t n = num_nodes.ptr<const int32_t>()[b];
    if (n < 0 || n > rows) {
      throw py::value_error("num_nodes[" + std::to_string(b) + "] is " + std::to_string(n) +
                            "; it must be in [0, " + std::to_string(rows) + "]");
    }
  }
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

}  // namespace inferlab
