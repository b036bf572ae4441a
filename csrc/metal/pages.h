// Where a slot of a sequence lies in the pages.
#pragma once

#include "inferlab/kv.h"

using namespace metal;
using namespace inferlab;

// The row of a slot in the pages, -1 where the table or its page does not exist.
// P: any of the parameters that have a block table.
template <typename P>
inline long row_of_slot(device const int* block_table, constant P& p, long b, long slot) {
  const uint shift = ctz(uint(p.page_size));  // a power of two
  const long index = slot >> shift;
  if (slot < 0 || index >= p.max_pages) return -1;
  const long page = block_table[b * p.table_stride + index];
  if (page < 0 || page >= p.pages) return -1;
  return (page << shift) + (slot & (p.page_size - 1));
}
