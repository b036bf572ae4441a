// build_tree: depths, child links and ancestor words of draft trees, from parent links.
//
// One thread per node of the batch, and none of them waits for another. Up: it walks its parents to
// the root, which have ever lower indices, and so writes its ancestor row word by word from the
// high end. Ahead: the first later node whose parent it is, is its first child; the first later
// node with its own parent, its next sibling. Parents are read again and again, from the
// first-level cache. Bytes: per node 4 read, 12 + 8 * words written; the time is that of depth +
// nodes / 8 dependent reads.
#include "inferlab/tree.h"
#include "launch.cuh"

namespace inferlab::cuda {
namespace {

constexpr int kThreads = 64;  // small blocks: a large tree is spread over multiprocessors
constexpr int kAhead = 8;

// Nodes on the way from n to the root, or -1 where the way leads out of the tree.
__device__ int64_t depth_of(const int32_t* parents, int64_t n) {
  int64_t depth = 0;
  for (; n > 0; ++depth) {
    const int64_t parent = parents[n];
    if (parent < 0 || parent >= n) return -1;
    n = parent;
  }
  return parents[0] == -1 ? depth : -1;
}

// The bits of n and its ancestors; `inside` says that n's way leads to the root.
__device__ void write_ancestors(const int32_t* parents, int64_t n, bool inside, uint64_t* row,
                                int64_t words) {
  int64_t node = inside ? n : -1;
  for (int64_t w = words - 1; w >= 0; --w) {
    uint64_t bits = 0;
    for (; node >= w * 64; node = parents[node]) bits |= uint64_t{1} << (node % 64);
    row[w] = bits;
  }
}

}  // namespace

// ---- kernel -------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) tree_kernel(BuildTreeParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= p.batch * p.nodes) return;
  const int64_t b = index / p.nodes, n = index % p.nodes;
  const int32_t* parents = p.parents + b * p.nodes;
  const int64_t depth = depth_of(parents, n);
  write_ancestors(parents, n, depth >= 0, p.ancestors + index * p.words, p.words);

  const int32_t own = parents[n];
  int32_t first_child = -1, next_sibling = -1;
  bool searching = depth >= 0;
  for (int64_t m = n + 1; searching && m < p.nodes; m += kAhead) {
    int32_t parent[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) parent[i] = m + i < p.nodes ? parents[m + i] : -2;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (parent[i] == n && first_child < 0) first_child = static_cast<int32_t>(m + i);
      if (parent[i] == own && next_sibling < 0) next_sibling = static_cast<int32_t>(m + i);
    }
    searching = first_child < 0 || next_sibling < 0;
  }
  p.depth[index] = static_cast<int32_t>(depth);
  p.first_child[index] = first_child;
  p.next_sibling[index] = n == 0 ? -1 : next_sibling;  // another -1 is no sibling of the root
}

// ---- launcher -----------------------------------------------------------------------------------

Status build_tree(const BuildTreeParams& p, void* stream) {
  const int64_t blocks = (p.batch * p.nodes + kThreads - 1) / kThreads;
  if (p.words * 64 < p.nodes || blocks > 0x7fffffff) return Status::kBadArgument;
  return launch(tree_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, p);
}

}  // namespace inferlab::cuda
