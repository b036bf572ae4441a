#include "bind.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of inferlab. Arguments are positional; see inferlab.kernels.";
  inferlab::bind_system(m);
  inferlab::bind_tree(m);
  inferlab::bind_sampling(m);
  inferlab::bind_attention(m);
  inferlab::bind_kv(m);
  inferlab::bind_layer(m);
  inferlab::bind_suffix(m);
  inferlab::bind_growth(m);
}
