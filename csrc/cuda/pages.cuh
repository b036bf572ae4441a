// Slots of the paged cache on the device, where nobody has looked at ids and lengths before, and
// the words that rows are moved in.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace inferlab::cuda {

constexpr unsigned kMaxGridYZ = 65535;
constexpr unsigned kMaxGridX = 0x7fffffffu;

// The pages of one sequence.
struct SlotTable {
  const int32_t* page_ids;  // [max_pages]
  int64_t max_pages, pages;
  int page_shift;

  // Row of the pool that holds a slot, or -1 where the table or the pool does not have it.
  __device__ int64_t row_of(int64_t slot) const {
    const int64_t index = slot >> page_shift;
    if (slot < 0 || index >= max_pages) return -1;
    const int64_t page = page_ids[index];
    if (page < 0 || page >= pages) return -1;
    return (page << page_shift) + (slot & ((int64_t{1} << page_shift) - 1));
  }
};

// P: any of the parameters that have a block table.
template <typename P>
__device__ SlotTable slot_table(const P& p, int64_t b, int64_t pages) {
  const int page_shift = __ffs(static_cast<int>(p.page_size)) - 1;  // a power of two
  return {p.block_table + b * p.table_stride, p.max_pages, pages, page_shift};
}

// A block of 256 threads over rows of `words` words: x along the row, y over rows.
constexpr int kRowThreads = 256;
inline dim3 row_block(int64_t words) {
  unsigned x = 1;
  while (x < kRowThreads && x < words) x *= 2;
  return dim3(x, kRowThreads / x);
}

}  // namespace inferlab::cuda
