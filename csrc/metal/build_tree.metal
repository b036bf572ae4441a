// build_tree: depths, child links and ancestor bit words of draft trees, from parent links.
//
// One threadgroup per tree. Each node finds its own depth, ancestors and links by following parents
// and scanning its siblings' parents, so nothing waits for anything: N steps per thread where a
// chain of dependent steps would be N long too. Bytes: per node 4 read, 12 + 8 * words written
// (parents are re-read from cache). A node whose parent makes no tree counts as padding, and so do
// its descendants.
#include "group.h"
#include "inferlab/tree.h"

// How deep node n hangs below the root; -1: it does not.
inline long depth_of(device const int* parents, long n) {
  long depth = 0;
  while (n > 0) {
    const long parent = parents[n];
    if (parent < 0 || parent >= n) return -1;
    n = parent;
    ++depth;
  }
  return parents[0] == -1 ? depth : -1;
}

kernel void build_tree(device const int* all_parents [[buffer(0)]], device int* depth [[buffer(1)]],
                       device int* first_child [[buffer(2)]],
                       device int* next_sibling [[buffer(3)]],
                       device ulong* ancestors [[buffer(4)]],
                       constant BuildTreeParams& p [[buffer(5)]],
                       uint3 group [[threadgroup_position_in_grid]],
                       uint3 threads [[threads_per_threadgroup]],
                       uint tid [[thread_index_in_threadgroup]]) {
  const long tree = group.x * p.nodes;
  device const int* parents = all_parents + tree;
  for (long n = tid; n < p.nodes; n += threads.x) {
    device ulong* row = ancestors + (tree + n) * p.words;
    for (long w = 0; w < p.words; ++w) row[w] = 0;
    const long d = depth_of(parents, n);
    int child = -1, sibling = -1;
    if (d >= 0) {
      for (long a = n; a >= 0; a = parents[a]) row[a / 64] |= 1UL << (a % 64);
      for (long m = p.nodes - 1; m > n; --m) {
        if (parents[m] == n) child = int(m);
        if (n > 0 && parents[m] == parents[n]) sibling = int(m);
      }
    }
    depth[tree + n] = int(d);
    first_child[tree + n] = child;
    next_sibling[tree + n] = sibling;
  }
}
