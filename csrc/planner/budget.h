// How much is drafted for each sequence: see `Budget` in specdec/tree.py.
#pragma once

namespace inferlab::planner {

struct Budget {
  int levels = 0;
  int nodes = 0;

  bool operator==(const Budget& other) const {
    return levels == other.levels && nodes == other.nodes;
  }
  bool operator!=(const Budget& other) const { return !(*this == other); }
};

}  // namespace inferlab::planner
