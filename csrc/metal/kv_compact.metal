// kv_compact: slot seq_lens[b] + accepted[b][j] -> slot seq_lens[b] + j in every layer, in place.
//
// One thread owns one word of the row, of one sequence and layer, of K or V, and takes it through
// all steps in order: accepted nodes increase, so a row is read before it is written over. Grid
// [words of a row, batch, 2 * layers]. Bytes: 2 * L * moved rows * Hkv * D * s read and written.
// Steps whose slots do not exist, or that would move a row up, are skipped.
#include "pages.h"
#include "word.h"

kernel void kv_compact(
    device Word* k_cache [[buffer(0)]], device Word* v_cache [[buffer(1)]],
    device const int* block_table [[buffer(2)]], device const int* seq_lens [[buffer(3)]],
    device const int* accepted [[buffer(4)]], device const int* num_accepted [[buffer(5)]],
    constant KvCompactParams& p [[buffer(6)]], uint3 group [[threadgroup_position_in_grid]],
    uint3 threads [[threads_per_threadgroup]], uint tid [[thread_index_in_threadgroup]]) {
  const long word = long(group.x) * threads.x + tid, b = group.y, layer = group.z >> 1;
  const long row_words = words_in(p.row_bytes);
  if (word >= row_words) return;
  device Word* cache =
      (group.z & 1 ? v_cache : k_cache) + word + layer * p.pages * p.page_size * row_words;
  const long start = seq_lens[b];
  const long count = num_accepted[b] < p.steps ? long(num_accepted[b]) : p.steps;
  for (long j = 0; j < count; ++j) {
    const long node = accepted[b * p.steps + j];
    if (node <= j) continue;
    const long from = row_of_slot(block_table, p, b, start + node);
    const long to = row_of_slot(block_table, p, b, start + j);
    if (from >= 0 && to >= 0) cache[to * row_words] = cache[from * row_words];
  }
}
