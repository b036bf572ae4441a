#include "bind.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of inferlab. Arguments are positional; see inferlab.kernels.";
  m.def_submodule("metal", "The ops by Metal's kernels; what launches them comes first.");
  m.attr("OPS") = pybind11::dict();  // name -> schema, and which arguments are written
  inferlab::bind_system(m);
  inferlab::bind_tree(m);
  inferlab::bind_sample(m);
  inferlab::bind_verify(m);
  inferlab::bind_attention(m);
  inferlab::bind_kv(m);
  inferlab::bind_layer(m);
  inferlab::bind_suffix(m);
  inferlab::bind_growth(m);
  inferlab::bind_planner(m);
  inferlab::bind_decoder(m);
}
