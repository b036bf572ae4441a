#include <string>

#include "bind.h"
#include "inferlab/growth.h"
#include "op.h"

namespace inferlab {
namespace {

void grow_level(Call& c) {
  Dim B("B"), M("M"), W("W"), candidates("candidates"), expansions("expansions"), words("words");
  const Arg& drawn = c.in("drawn", kI32, {B, M, W});
  const Arg& scores = c.in("scores", kF32, {B, M, W});
  const Arg& above = c.in("above", kI64, {B, M, words}).optional();
  const int64_t level = c.integer("level");
  const Arg& tokens = c.out("tokens", kI32, {B, candidates});
  const Arg& confidence = c.out("confidence", kF32, {B, candidates});
  const Arg& expanded = c.out("expanded", kI32, {B, expansions});
  const Arg& next_tokens = c.out("next_tokens", kI32, {B, W}).optional();
  const Arg& next_parents = c.out("next_parents", kI64, {B, W}).optional();
  const Arg& next_ancestors = c.out("next_ancestors", kI64, {B, W, words}).optional();
  if (!c.ready()) return;
  if (!c.on_cpu()) return c.decline();
  const int64_t before = level == 0 ? 0 : 1 + (level - 1) * W;
  require(level >= 0 && W >= 1 && M == (level == 0 ? 1 : W) && before + M <= expansions &&
              (before + M) * W <= candidates,
          [&] {
            return "drawn has shape " + drawn.shape_str() + " at level " + std::to_string(level) +
                   "; it must be [B, 1, W] at level 0 and [B, W, W] below, within the growth";
          });
  GrowLevelParams p{};
  p.batch = B;
  p.parents = M;
  p.width = W;
  p.level = level;
  p.candidates = candidates;
  p.expansions = expansions;
  p.drawn = drawn.ptr<const int32_t>();
  p.scores = scores.ptr<const float>();
  p.tokens = tokens.ptr<int32_t>();
  p.confidence = confidence.ptr<float>();
  p.expanded = expanded.ptr<int32_t>();
  if (next_tokens.given()) {
    require(next_parents.given() && next_ancestors.given(),
            "next_parents and next_ancestors must be given with next_tokens");
    const int64_t last = 1 + level * W + W;  // behind the last slot
    require(last <= expansions && last <= words * 64, [&] {
      return "expanded has shape " + expanded.shape_str() + "; level " + std::to_string(level) +
             " needs " + std::to_string(last) + " entries and as many ancestor bits";
    });
    p.words = words;
    p.next_tokens = next_tokens.ptr<int32_t>();
    p.next_parents = next_parents.ptr<int64_t>();
    p.next_ancestors = next_ancestors.ptr<uint64_t>();
    p.above = above.ptr<const uint64_t>();
  }
  c.cpu([&] { return cpu::grow_level(p); });
}

void grow_tree(Call& c) {
  Dim B("B"), candidates("candidates"), expansions("expansions"), nodes("nodes");
  const Arg& roots = c.in("roots", kI32, {B});
  const Arg& tokens = c.in("tokens", kI32, {B, candidates}).decides();
  const Arg& confidence = c.in("confidence", kF32, {B, candidates});
  const Arg& expanded = c.in("expanded", kI32, {B, expansions});
  const int64_t width = c.integer("width");
  const Arg& tree_tokens = c.out("tree_tokens", kI32, {B, nodes});
  const Arg& tree_parents = c.out("tree_parents", kI32, {B, nodes});
  const Arg& tree_confidence = c.out("tree_confidence", kF32, {B, nodes});
  if (!c.ready()) return;
  if (!c.on_cpu()) return c.decline();
  require(width >= 1 && nodes >= 1 && nodes <= candidates + 1 &&
              (candidates + width - 1) / width <= expansions,
          [&] {
            return "tree_tokens has shape " + tree_tokens.shape_str() + "; a growth of " +
                   std::to_string(candidates) + " candidates has at most as many nodes and a root";
          });
  GrowTreeParams p{};
  p.batch = B;
  p.width = width;
  p.candidates = candidates;
  p.expansions = expansions;
  p.nodes = nodes;
  p.roots = roots.ptr<const int32_t>();
  p.tokens = tokens.ptr<const int32_t>();
  p.confidence = confidence.ptr<const float>();
  p.expanded = expanded.ptr<const int32_t>();
  p.tree_tokens = tree_tokens.ptr<int32_t>();
  p.tree_parents = tree_parents.ptr<int32_t>();
  p.tree_confidence = tree_confidence.ptr<float>();
  c.cpu([&] { return cpu::grow_tree(p); });
}

void grow_offsets(Call& c) {
  Dim B("B"), depth("D"), width("W"), nodes("nodes");
  const Arg& roots = c.in("roots", kI32, {B});
  const Arg& drawn = c.in("drawn", kI32, {B, depth, width}).decides();
  const Arg& scores = c.in("scores", kF32, {B, depth, width});
  const Arg& tree_tokens = c.out("tree_tokens", kI32, {B, nodes});
  const Arg& tree_parents = c.out("tree_parents", kI32, {B, nodes});
  const Arg& tree_confidence = c.out("tree_confidence", kF32, {B, nodes});
  if (!c.ready()) return;
  if (!c.on_cpu()) return c.decline();
  int64_t paths = 1, level = 1;
  for (int64_t i = 0; i < depth && paths < nodes; ++i) paths += level *= width;
  require(nodes >= 1 && nodes <= paths, [&] {
    return "tree_tokens has shape " + tree_tokens.shape_str() + "; drawn of shape " +
           drawn.shape_str() + " has no more than " + std::to_string(paths) +
           " paths, the root included";
  });
  GrowOffsetsParams p{};
  p.batch = B;
  p.depth = depth;
  p.width = width;
  p.nodes = nodes;
  p.roots = roots.ptr<const int32_t>();
  p.drawn = drawn.ptr<const int32_t>();
  p.scores = scores.ptr<const float>();
  p.tree_tokens = tree_tokens.ptr<int32_t>();
  p.tree_parents = tree_parents.ptr<int32_t>();
  p.tree_confidence = tree_confidence.ptr<float>();
  c.cpu([&] { return cpu::grow_offsets(p); });
}

}  // namespace

void bind_growth(py::module_& m) {
  m.attr("NEVER_CONFIDENT") = kNeverConfident;
  define(m, "grow_level", grow_level);
  define(m, "grow_tree", grow_tree);
  define(m, "grow_offsets", grow_offsets);
}

}  // namespace inferlab
