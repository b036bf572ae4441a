// build_tree: what verification and attention need to know of a draft tree, from parent links.
//
// Bytes moved: per node 4 read, 12 + 8 * words written; on the CPU, one pass over the nodes in
// order, 8 * words more are read, the parent's row.
#pragma once

#include "inferlab/portable.h"
#include "inferlab/status.h"

namespace inferlab {

struct BuildTreeParams {
  Ptr<const int32_t> parents;  // [batch, nodes]; root -1, padding -2, else below its own index
  Ptr<int32_t> depth;          // [batch, nodes] out
  Ptr<int32_t> first_child;    // [batch, nodes] out
  Ptr<int32_t> next_sibling;   // [batch, nodes] out
  Ptr<uint64_t> ancestors;  // [batch, nodes, words] out; bit j of row n: j is n or an ancestor of n
  int64_t batch;
  int64_t nodes;
  int64_t words;  // ceil(nodes / 64)
};

#if !defined(__METAL_VERSION__)
// The first parent that does not make a tree.
struct BadParent {
  int64_t sequence = -1;  // -1: all are good
  int64_t node = -1;
};

namespace cpu {
Status build_tree(const BuildTreeParams& params, BadParent& bad);
}  // namespace cpu

namespace cuda {
// Pointers on the device. A node whose parent does not make a tree becomes padding, and so does all
// that hangs on it: nobody is there to report it to, and no link leads out of the tree.
Status build_tree(const BuildTreeParams& params, void* stream);
}  // namespace cuda
#endif
}  // namespace inferlab
