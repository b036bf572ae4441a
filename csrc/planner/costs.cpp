#include "costs.h"

#include <algorithm>

namespace inferlab::planner {

Line::Line(std::vector<double> xs, std::vector<double> ys)
    : xs_(std::move(xs)), ys_(std::move(ys)) {}

double Line::at(double x) const {
  if (xs_.size() == 1 || x <= xs_[0]) return ys_[0];
  const auto above = std::upper_bound(xs_.begin(), xs_.end(), x) - xs_.begin();
  const size_t i = std::min(static_cast<size_t>(above), xs_.size() - 1);
  const double slope = (ys_[i] - ys_[i - 1]) / (xs_[i] - xs_[i - 1]);
  return ys_[i - 1] + slope * (x - xs_[i - 1]);
}

double StepCosts::ms(int batch, double rows, double context) const {
  return own.at(rows) + per_sequence * (batch - 1) + per_key * batch * context +
         per_product * rows * context;
}

double DraftCosts::ms(int batch, double nodes) const {
  if (by_batch.empty()) return 0;
  std::vector<double> times;
  // More sequences never take less: what was measured so is noise.
  for (const Line& line : by_batch) {
    times.push_back(std::max(line.at(nodes), times.empty() ? 0.0 : times.back()));
  }
  return Line(batches, std::move(times)).at(batch);
}

double DraftCosts::reading_ms(int tokens) const {
  return reading.empty() || tokens <= 0 ? 0.0 : reading.at(tokens);
}

}  // namespace inferlab::planner
