#include <algorithm>
#include <string>

#include "bind.h"
#include "inferlab/tree.h"
#include "op.h"

namespace inferlab {
namespace {

[[noreturn]] void fail_parent(const BuildTreeParams& p, const BadParent& bad) {
  const int32_t value = p.parents[bad.sequence * p.nodes + bad.node];
  std::string must = "it must be -1, the root's";
  if (bad.node > 0) {
    must = value >= 0 && value < bad.node
               ? std::string("which is a padding node")
               : "it must be in [0, " + std::to_string(bad.node) + "), or -2 for padding";
  }
  throw py::value_error("parents[" + std::to_string(bad.sequence) + ", " +
                        std::to_string(bad.node) + "] is " + std::to_string(value) + "; " + must);
}

void build_tree(Call& c) {
  Dim B("B"), N("N"), W("W");
  const Arg& parents = c.in("parents", kI32, {B, N});
  const Arg& depth = c.out("depth", kI32, {B, N});
  const Arg& first_child = c.out("first_child", kI32, {B, N});
  const Arg& next_sibling = c.out("next_sibling", kI32, {B, N});
  const Arg& ancestors = c.out("ancestors", kI64, {B, N, W});
  if (!c.ready()) return;
  require(B >= 1 && N >= 1, [&] {
    return "parents has shape " + parents.shape_str() + "; it must have at least one node";
  });
  BuildTreeParams p{};
  p.parents = parents.ptr<const int32_t>();
  p.depth = depth.ptr<int32_t>();
  p.first_child = first_child.ptr<int32_t>();
  p.next_sibling = next_sibling.ptr<int32_t>();
  p.ancestors = ancestors.ptr<uint64_t>();
  p.batch = B;
  p.nodes = N;
  p.words = (p.nodes + 63) / 64;
  ancestors.shape({B, N, p.words});
  BadParent bad;
  c.cpu([&] { return cpu::build_tree(p, bad); });
  c.cuda([&](void* stream) { return cuda::build_tree(p, stream); });
  c.metal(p, {B, 1, 1, std::min<int64_t>(256, (N + 31) / 32 * 32)}, {});
  if (bad.sequence >= 0) fail_parent(p, bad);
}

}  // namespace

void bind_tree(py::module_& m) { define(m, "build_tree", build_tree); }

}  // namespace inferlab
