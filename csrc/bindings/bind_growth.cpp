#include <string>

#include "bind.h"
#include "inferlab/growth.h"
#include "tensor.h"

namespace py = pybind11;

namespace inferlab {
namespace {

void grow_level(py::handle drawn, py::handle scores, py::handle above, int64_t level,
                py::handle tokens, py::handle confidence, py::handle expanded,
                py::handle next_tokens, py::handle next_parents, py::handle next_ancestors) {
  Tensor d(drawn, "drawn"), s(scores, "scores"), t(tokens, "tokens"), c(confidence, "confidence"),
      e(expanded, "expanded");
  d.dims(3).i32().contiguous().cpu();
  GrowLevelParams p{};
  p.batch = d.size(0);
  p.parents = d.size(1);
  p.width = d.size(2);
  p.level = level;
  s.f32().shape({p.batch, p.parents, p.width}).contiguous().cpu();
  p.candidates = t.dims(2).i32().shape({p.batch, Tensor::kAny}).contiguous().cpu().size(1);
  c.f32().shape({p.batch, p.candidates}).contiguous().cpu();
  p.expansions = e.dims(2).i32().shape({p.batch, Tensor::kAny}).contiguous().cpu().size(1);
  const int64_t before = level == 0 ? 0 : 1 + (level - 1) * p.width;
  require(level >= 0 && p.width >= 1 && p.parents == (level == 0 ? 1 : p.width) &&
              before + p.parents <= p.expansions && (before + p.parents) * p.width <= p.candidates,
          [&] {
            return "drawn has shape " + d.shape_str() + " at level " + std::to_string(level) +
                   "; it must be [B, 1, W] at level 0 and [B, W, W] below, within the growth";
          });
  p.drawn = d.ptr<const int32_t>();
  p.scores = s.ptr<const float>();
  p.tokens = t.ptr<int32_t>();
  p.confidence = c.ptr<float>();
  p.expanded = e.ptr<int32_t>();
  if (next_tokens.is_none()) {
    run_cpu("grow_level", [&] { return cpu::grow_level(p); });
    return;
  }
  Tensor nt(next_tokens, "next_tokens"), np(next_parents, "next_parents"),
      na(next_ancestors, "next_ancestors");
  nt.i32().shape({p.batch, p.width}).contiguous().cpu();
  np.i64().shape({p.batch, p.width}).contiguous().cpu();
  p.words = na.i64().shape({p.batch, p.width, Tensor::kAny}).contiguous().cpu().size(2);
  const int64_t last = 1 + level * p.width + p.width;  // behind the last slot
  require(last <= p.expansions && last <= p.words * 64, [&] {
    return "expanded has shape " + e.shape_str() + "; level " + std::to_string(level) + " needs " +
           std::to_string(last) + " entries and as many ancestor bits";
  });
  p.next_tokens = nt.ptr<int32_t>();
  p.next_parents = np.ptr<int64_t>();
  p.next_ancestors = na.ptr<uint64_t>();
  if (above.is_none()) {
    run_cpu("grow_level", [&] { return cpu::grow_level(p); });
    return;
  }
  Tensor a(above, "above");
  a.i64().shape({p.batch, p.parents, p.words}).contiguous().cpu();
  p.above = a.ptr<const uint64_t>();
  run_cpu("grow_level", [&] { return cpu::grow_level(p); });
}

void grow_tree(py::handle roots, py::handle tokens, py::handle confidence, py::handle expanded,
               int64_t width, py::handle tree_tokens, py::handle tree_parents) {
  Tensor r(roots, "roots"), t(tokens, "tokens"), c(confidence, "confidence"),
      e(expanded, "expanded"), tt(tree_tokens, "tree_tokens"), tp(tree_parents, "tree_parents");
  GrowTreeParams p{};
  p.batch = t.dims(2).i32().contiguous().cpu().size(0);
  p.candidates = t.size(1);
  p.width = width;
  r.i32().shape({p.batch}).contiguous().cpu();
  c.f32().shape({p.batch, p.candidates}).contiguous().cpu();
  p.expansions = e.dims(2).i32().shape({p.batch, Tensor::kAny}).contiguous().cpu().size(1);
  p.nodes = tt.dims(2).i32().shape({p.batch, Tensor::kAny}).contiguous().cpu().size(1);
  tp.i32().shape({p.batch, p.nodes}).contiguous().cpu();
  require(width >= 1 && p.nodes >= 1 && p.nodes <= p.candidates + 1 &&
              (p.candidates + width - 1) / width <= p.expansions,
          [&] {
            return "tree_tokens has shape " + tt.shape_str() + "; a growth of " +
                   std::to_string(p.candidates) +
                   " candidates has at most as many nodes and a root";
          });
  p.roots = r.ptr<const int32_t>();
  p.tokens = t.ptr<const int32_t>();
  p.confidence = c.ptr<const float>();
  p.expanded = e.ptr<const int32_t>();
  p.tree_tokens = tt.ptr<int32_t>();
  p.tree_parents = tp.ptr<int32_t>();
  run_cpu("grow_tree", [&] { return cpu::grow_tree(p); });
}

void grow_offsets(py::handle roots, py::handle drawn, py::handle scores, py::handle tree_tokens,
                  py::handle tree_parents) {
  Tensor r(roots, "roots"), d(drawn, "drawn"), s(scores, "scores"), tt(tree_tokens, "tree_tokens"),
      tp(tree_parents, "tree_parents");
  d.dims(3).i32().contiguous().cpu();
  GrowOffsetsParams p{};
  p.batch = d.size(0);
  p.depth = d.size(1);
  p.width = d.size(2);
  r.i32().shape({p.batch}).contiguous().cpu();
  s.f32().shape({p.batch, p.depth, p.width}).contiguous().cpu();
  p.nodes = tt.dims(2).i32().shape({p.batch, Tensor::kAny}).contiguous().cpu().size(1);
  tp.i32().shape({p.batch, p.nodes}).contiguous().cpu();
  int64_t paths = 1, level = 1;
  for (int64_t i = 0; i < p.depth && paths < p.nodes; ++i) paths += level *= p.width;
  require(p.nodes >= 1 && p.nodes <= paths, [&] {
    return "tree_tokens has shape " + tt.shape_str() + "; drawn of shape " + d.shape_str() +
           " has no more than " + std::to_string(paths) + " paths, the root included";
  });
  p.roots = r.ptr<const int32_t>();
  p.drawn = d.ptr<const int32_t>();
  p.scores = s.ptr<const float>();
  p.tree_tokens = tt.ptr<int32_t>();
  p.tree_parents = tp.ptr<int32_t>();
  run_cpu("grow_offsets", [&] { return cpu::grow_offsets(p); });
}

}  // namespace

void bind_growth(py::module_& m) {
  m.def("grow_level", &grow_level);
  m.def("grow_tree", &grow_tree);
  m.def("grow_offsets", &grow_offsets);
}

}  // namespace inferlab
