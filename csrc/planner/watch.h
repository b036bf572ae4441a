// How sure a draft model is of its chains, told to a compiled judge level by level: as
// specdec/drafters/ watched.py does for other judges.
#pragma once

#include <cstdint>
#include <vector>

#include "judge.h"

namespace inferlab::planner {

class Watch {
 public:
  Watch(Judge& judge, std::vector<int64_t> requests)
      : judge_(judge), requests_(std::move(requests)), sure_(requests_.size(), 1.0) {}

  // Takes the scores [R][2] of a level's two best tokens; whether to draft another one.
  bool goes_on(const float* scores);
  // How many tokens of each chain are to be verified.
  std::vector<int> counts();

 private:
  Judge& judge_;
  std::vector<int64_t> requests_;
  std::vector<double> sure_;
  std::vector<std::vector<int>> kinds_{requests_.size()};  // of each chain
};

}  // namespace inferlab::planner
