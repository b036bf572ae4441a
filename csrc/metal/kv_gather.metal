// kv_gather: the first seq_lens[b] slots of each sequence as dense rows, zeros behind them.
//
// One threadgroup per row of the result; grid [max_len, batch]. Bytes: B * seq_len rows read, B *
// max_len rows written. Slots that do not exist give zeros.
#include "pages.h"
#include "word.h"

kernel void kv_gather(device const Word* pages [[buffer(0)]],
                      device const int* block_table [[buffer(1)]],
                      device const int* seq_lens [[buffer(2)]], device Word* out [[buffer(3)]],
                      constant KvGatherParams& p [[buffer(4)]],
                      uint3 group [[threadgroup_position_in_grid]],
                      uint3 threads [[threads_per_threadgroup]],
                      uint tid [[thread_index_in_threadgroup]]) {
  const long slot = group.x, b = group.y, row_words = words_in(p.row_bytes);
  const long row = slot < seq_lens[b] ? row_of_slot(block_table, p, b, slot) : -1;
  device Word* to = out + (b * p.max_len + slot) * row_words;
  for (long w = tid; w < row_words; w += threads.x) {
    to[w] = row < 0 ? Word(0) : pages[row * row_words + w];
  }
}
