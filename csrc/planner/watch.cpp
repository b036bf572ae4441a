#include "watch.h"

#include <algorithm>
#include <cmath>

#include "acceptance.h"

namespace inferlab::planner {

bool Watch::goes_on(const float* scores) {
  std::vector<int> kinds;
  for (size_t i = 0; i < sure_.size(); ++i) {
    // A token competes with the runner-up by the sigmoid of the gap between them. One that has no
    // rival has an infinite gap; an invalid row is NaN.
    const double best = scores[2 * i], second = scores[2 * i + 1];
    sure_[i] =
        best > second ? sure_[i] / (1 + std::exp(std::min(second - best, 50.0))) : sure_[i] * 0.5;
    kinds.push_back(kind_of(sure_[i]));
    kinds_[i].push_back(kinds.back());
  }
  return judge_.goes_on(requests_, kinds);
}

std::vector<int> Watch::counts() { return judge_.keep(requests_, kinds_); }

}  // namespace inferlab::planner
