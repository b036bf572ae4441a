#include "prospects.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "stragglers.h"

namespace inferlab::planner {
int Rates::best() const {
  return static_cast<int>(std::max_element(rates.begin(), rates.end()) - rates.begin());
}

double Rates::hope() const { return *std::max_element(rates.begin() + 1, rates.end()) / rates[0]; }

Prospects::Prospects(const std::vector<Budget>& rungs, const Known& known, StepTimes& times)
    : acceptance(known.by_kind, known.evidence),
      ranks(rungs.back().nodes, known.by_rank, known.evidence),
      times_(times) {
  for (const Budget& rung : rungs) nodes.push_back(rung.nodes);
}

Rates Prospects::rates(const Outlook& outlook, const std::vector<int>& members) {
  const int size = outlook.size(), count = static_cast<int>(members.size());
  const size_t rungs = nodes.size();
  const std::vector<double>&accepted = ranks.accepted(), &kept = ranks.verified();
  std::vector<std::vector<double>> gained(size, std::vector<double>(rungs));
  std::vector<double> known(size);
  for (const int place : members) {
    const int64_t request = outlook.requests[place];
    const double factor = acceptance.factor(request);
    known[place] = acceptance.known(request);
    double sum = 0;
    int rank = 0;
    for (size_t rung = 1; rung < rungs; ++rung) {
      for (; rank < nodes[rung]; ++rank) {
        const double chance = accepted[rank + 1] - accepted[rank];
        sum += chance * factor / (1 + chance * (factor - 1));
      }
      gained[place][rung] = sum;
    }
  }
  const std::vector<double>& times = times_.verify(size, outlook.context);
  Rates result;
  result.own = own_share(outlook);
  Course course =
      planner::course(outlook.remaining.empty() ? std::vector<int>(size, kSome) : outlook.remaining,
                      gained, known, result.own);
  result.plain = times[size];
  result.drafting = times_.draft(count);
  result.pull = std::move(course.pull);
  for (size_t rung = 0; rung < rungs; ++rung) {
    const double rows = outlook.packs ? size + count * kept[nodes[rung]]
                                      : static_cast<double>(size) * (1 + nodes[rung]);
    const auto row = std::min(static_cast<size_t>(std::ceil(rows)), times.size() - 1);
    // A drafter that hears of all steps can be told to give up, so plain ones go without it. The
    // others are judged as kindly as if it cost them: that a judge cuts drafts is not in the ranks.
    const bool free = rung == 0 && outlook.unread.empty();
    result.ms.push_back(times[row] + (free ? 0 : result.drafting[rung]));
    result.gains.push_back(course.steps[0] / course.steps[rung] - 1);
    result.rates.push_back(size * (1 + result.gains[rung]) / result.ms[rung]);
  }
  return result;
}

double Prospects::own_share(const Outlook& outlook) const {
  const int size = outlook.size();
  if (size == 1 || outlook.waiting || static_cast<int>(outlook.remaining.size()) != size) return 1;
  const double all = times_.model(size, size), one = times_.model(1, 1);
  return std::min(std::max((all - one) / (size - 1), 0.0) * size / all, 1.0);
}

double Prospects::certainty(const Outlook& outlook, const std::vector<int>& members) const {
  double unknown = 0;
  for (const int place : members) unknown += 1 - acceptance.known(outlook.requests[place]);
  if (!members.empty()) unknown /= static_cast<double>(members.size());
  return 1 - (1 - acceptance.certainty()) * unknown;
}

double Prospects::sure(double certainty, int sequences) {
  return certainty * (1 - (1 - certainty) / std::sqrt(std::max(sequences, 1)));
}

}  // namespace inferlab::planner
