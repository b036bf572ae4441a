#include <string>

#include "bind.h"
#include "inferlab/tree.h"
#include "tensor.h"

namespace py = pybind11;

namespace inferlab {

void bind_tree(py::module_& m) {
  m.def("build_tree", [](py::handle parents, py::handle depth, py::handle first_child,
                         py::handle next_sibling, py::handle ancestors) {
    Tensor p(parents, "parents"), d(depth, "depth"), f(first_child, "first_child"),
        s(next_sibling, "next_sibling"), a(ancestors, "ancestors");
    const Place place = p.place();
    p.dims(2).i32().contiguous();
    const int64_t batch = p.size(0), nodes = p.size(1), words = (nodes + 63) / 64;
    require(batch >= 1 && nodes >= 1,
            "parents has shape " + p.shape_str() + "; it must have at least one node");
    for (const Tensor* t : {&d, &f, &s}) t->i32().shape({batch, nodes}).contiguous().on(place);
    a.i64().shape({batch, nodes, words}).contiguous().on(place);
    const BuildTreeParams params{p.ptr<const int32_t>(),
                                 d.ptr<int32_t>(),
                                 f.ptr<int32_t>(),
                                 s.ptr<int32_t>(),
                                 a.ptr<uint64_t>(),
                                 batch,
                                 nodes,
                                 words};
    if (place.cuda) {
      run_cuda(parents, place, "build_tree",
               [&](void* stream) { return cuda::build_tree(params, stream); });
      return;
    }
    BadParent bad;
    run_cpu("build_tree", [&] { return cpu::build_tree(params, bad); });
    if (bad.sequence >= 0) {
      const int32_t value = params.parents[bad.sequence * nodes + bad.node];
      std::string must = "it must be -1, the root's";
      if (bad.node > 0) {
        must = value >= 0 && value < bad.node
                   ? std::string("which is a padding node")
                   : "it must be in [0, " + std::to_string(bad.node) + "), or -2 for padding";
      }
      throw py::value_error("parents[" + std::to_string(bad.sequence) + ", " +
                            std::to_string(bad.node) + "] is " + std::to_string(value) + "; " +
                            must);
    }
  });
}

}  // namespace inferlab
