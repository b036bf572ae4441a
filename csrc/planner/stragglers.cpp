#include "stragglers.h"

#include <algorithm>
#include <cmath>

namespace inferlab::planner {
namespace {

constexpr double kSoft = 0.7;
constexpr double kAhead = 3;  // tokens that a step brings one sequence more, to count so much less

}  // namespace

Course course(const std::vector<int>& remaining, const std::vector<std::vector<double>>& gained,
              const std::vector<double>& known, double own) {
  const size_t size = remaining.size(), ways = gained.front().size();
  Course result{std::vector<double>(ways),
                std::vector<std::vector<double>>(size, std::vector<double>(ways, 1.0))};
  std::vector<double> steps(size), behind(size);
  for (size_t way = 0; way < ways; ++way) {
    double mean = 0, deviation = 0, most = 0;
    for (size_t i = 0; i < size; ++i) {
      const double gain = gained[i][way];
      const double n = steps[i] = std::max(remaining[i] / (1 + gain), 1.0);
      mean += n / size;
      most = std::max(most, n);
      const double texts = kTexts * kTexts * (1 - known[i]);
      deviation += n * gain / (1 + gain) * std::sqrt(texts + kSteps * kSteps / n) / size;
    }
    result.steps[way] = mean;
    if (own == 1) continue;
    const double soft = std::max(kSoft * deviation, 1e-3);
    double all_behind = 0;
    for (size_t i = 0; i < size; ++i) {
      all_behind += behind[i] = std::exp((steps[i] - most) / soft);
    }
    result.steps[way] = own * mean + (1 - own) * (most + soft * std::log(all_behind));
    for (size_t i = 0; i < size; ++i) {
      result.pull[i][way] = own + (1 - own) * size * behind[i] / all_behind;
    }
  }
  return result;
}

std::vector<double> lead(int levels, double gained) {
  std::vector<double> worth;
  for (int n = 0; n <= levels; ++n) worth.push_back(std::exp((gained - n) / kAhead));
  return worth;
}

}  // namespace inferlab::planner
