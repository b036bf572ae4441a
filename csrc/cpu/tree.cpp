#include "inferlab/tree.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace inferlab::cpu {
namespace {

// Index of the first bad node of sequence b, or -1.
int64_t build_one(const BuildTreeParams& p, int64_t b) {
  const int32_t* parents = p.parents + b * p.nodes;
  int32_t* depth = p.depth + b * p.nodes;
  int32_t* first_child = p.first_child + b * p.nodes;
  int32_t* next_sibling = p.next_sibling + b * p.nodes;
  uint64_t* ancestors = p.ancestors + b * p.nodes * p.words;
  thread_local std::vector<int32_t> last_child;
  last_child.resize(static_cast<size_t>(p.nodes));

  for (int64_t n = 0; n < p.nodes; ++n) {
    const int32_t parent = parents[n];
    uint64_t* row = ancestors + n * p.words;
    first_child[n] = next_sibling[n] = last_child[n] = -1;
    if (n == 0) {
      if (parent != -1) return 0;
      std::memset(row, 0, static_cast<size_t>(p.words) * 8);
      depth[0] = 0;
      row[0] = 1;
      continue;
    }
    if (parent == -2) {
      std::memset(row, 0, static_cast<size_t>(p.words) * 8);
      depth[n] = -1;
      continue;
    }
    if (parent < 0 || parent >= n || depth[parent] < 0) return n;
    std::memcpy(row, ancestors + parent * p.words, static_cast<size_t>(p.words) * 8);
    row[n / 64] |= uint64_t{1} << (n % 64);
    depth[n] = depth[parent] + 1;
    const int32_t older = last_child[parent];
    (older < 0 ? first_child[parent] : next_sibling[older]) = static_cast<int32_t>(n);
    last_child[parent] = static_cast<int32_t>(n);
  }
  return -1;
}

}  // namespace

Status build_tree(const BuildTreeParams& params, BadParent& bad) {
  if (params.words * 64 < params.nodes) return Status::kBadArgument;
  std::atomic<int64_t> first_bad{params.batch * params.nodes};
  parallel_for(params.batch, params.batch * params.nodes * (16 + 16 * params.words),
               [&](int64_t b) {
                 const int64_t node = build_one(params, b);
                 if (node < 0) return;
                 const int64_t index = b * params.nodes + node;
                 int64_t seen = first_bad.load();
                 while (index < seen && !first_bad.compare_exchange_weak(seen, index)) {
                 }
               });
  const int64_t index = first_bad.load();
  if (index < params.batch * params.nodes) {
    bad = BadParent{index / params.nodes, index % params.nodes};
  }
  return Status::kOk;
}

}  // namespace inferlab::cpu
