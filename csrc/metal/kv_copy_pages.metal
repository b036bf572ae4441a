// kv_copy_pages: page src[i] -> page dst[i] in every layer of the K and V caches.
//
// Threads stride over the words of one page of one layer of K or V; grid [pieces of a page, pairs,
// 2 * layers]. Bytes: 2 * L * M * page bytes read and written. Pairs out of [0, pages) are skipped.
#include "inferlab/kv.h"
#include "word.h"

kernel void kv_copy_pages(device Word* k_cache [[buffer(0)]], device Word* v_cache [[buffer(1)]],
                          device const int* src [[buffer(2)]], device const int* dst [[buffer(3)]],
                          constant KvCopyPagesParams& p [[buffer(4)]],
                          uint3 group [[threadgroup_position_in_grid]],
                          uint3 groups [[threadgroups_per_grid]],
                          uint3 threads [[threads_per_threadgroup]],
                          uint tid [[thread_index_in_threadgroup]]) {
  const long from = src[group.y], to = dst[group.y], layer = group.z >> 1;
  if (from < 0 || from >= p.pages || to < 0 || to >= p.pages || from == to) return;
  const long page_words = words_in(p.page_bytes);
  device Word* cache = group.z & 1 ? v_cache : k_cache;
  device const Word* source = cache + (layer * p.pages + from) * page_words;
  device Word* target = cache + (layer * p.pages + to) * page_words;
  for (long w = long(group.x) * threads.x + tid; w < page_words; w += long(groups.x) * threads.x) {
    target[w] = source[w];
  }
}
