// Where a slot of a sequence lies in the pages.
#pragma once

#include "inferlab/portable.h"

using namespace metal;

struct PageTable {
  long pages, page_shift;        // page size 1 << page_shift
  long max_pages, table_stride;  // of block_table
};

// The row of a slot in the pages, -1 where the table or its page does not exist.
inline long row_of_slot(device const int* block_table, constant PageTable& t, long b, long slot) {
  const long index = slot >> t.page_shift;
  if (slot < 0 || index >= t.max_pages) return -1;
  const long page = block_table[b * t.table_stride + index];
  if (page < 0 || page >= t.pages) return -1;
  return (page << t.page_shift) + (slot & ((1L << t.page_shift) - 1));
}
