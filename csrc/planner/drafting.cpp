#include "drafting.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace inferlab::planner {

Drafting::Drafting(Plan decided, Outlook seen, double stake)
    : plan(std::move(decided)), outlook(std::move(seen)), stake_(stake), left_(stake - plan.loss) {}

bool Drafting::is_of(const std::vector<int64_t>& requests) const {
  const auto same = [&](int64_t request, int place) { return request == outlook.requests[place]; };
  return std::equal(requests.begin(), requests.end(), plan.members.begin(), plan.members.end(),
                    same);
}

bool Drafting::goes_on(Prospects& prospects, const std::vector<int64_t>& requests,
                       const std::vector<int>& kinds) {
  const int deepest = static_cast<int>(plan.drafting.size()) - 1;
  level = std::min(level + 1, deepest);
  if (plan.tries || level == deepest) return false;
  double worth = 0, next = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    const double chance = prospects.acceptance.chance(requests[i], kinds[i]);
    worth += chance * plan.worth_of[level][i];
    next += chance * plan.worth_of[level + 1][i];
  }
  if (level > 1) prospects.onward.observe(above_, worth);
  above_ = next;
  const double hope = next * prospects.onward.share();
  // Another level, and at least a row where it is worth something.
  const int size = outlook.size(), rows = size + static_cast<int>(requests.size()) * level;
  const int deeper = outlook.packs ? rows + 1 : size * (2 + level);
  const double more = plan.drafting[level + 1] - plan.drafting[level] + plan.verifying(deeper) -
                      plan.verifying(rows);
  left_ -= more - plan.sure * hope;
  return hope > plan.price * more && left_ >= 0;
}

std::vector<int> Drafting::keep(const Prospects& prospects, const std::vector<int64_t>& requests,
                                const std::vector<std::vector<int>>& drafted) {
  std::vector<int> counts;
  const bool all_known = std::all_of(drafted.begin(), drafted.end(), [&](const auto& of) {
    return of.size() < plan.worth_of.size();
  });
  if (plan.tries || !all_known) {
    for (const auto& of : drafted) counts.push_back(static_cast<int>(of.size()));
  } else {
    std::vector<std::vector<double>> chances;
    for (size_t i = 0; i < requests.size(); ++i) {
      chances.push_back(prospects.acceptance.of(requests[i], drafted[i]));
    }
    counts = worth_verifying(std::move(chances));
  }
  kinds = offered = drafted;
  for (size_t i = 0; i < kinds.size(); ++i) kinds[i].resize(counts[i]);
  judged = true;
  return counts;
}

// How many nodes of each sequence: the likeliest of all, as many as pay.
std::vector<int> Drafting::worth_verifying(std::vector<std::vector<double>> chances) {
  const int size = outlook.size();
  std::vector<std::tuple<double, int, int>> found;  // less its worth, node, sequence
  std::vector<double> alike;                        // of the first n nodes of all
  // A chain: its n-th node is the n-th token that the step brings.
  for (int s = 0; s < static_cast<int>(chances.size()); ++s) {
    for (int n = 0; n < static_cast<int>(chances[s].size()); ++n) {
      const double worth = chances[s][n] * plan.worth_of[n + 1][s];
      found.emplace_back(-worth, n, s);
      if (n == static_cast<int>(alike.size())) alike.push_back(0);
      alike[n] += worth;
    }
  }
  for (size_t n = 1; n < alike.size(); ++n) alike[n] += alike[n - 1];
  std::sort(found.begin(), found.end());
  int best = 0, depth = 0;
  double brought = 0;
  for (int count = 1; count <= static_cast<int>(found.size()); ++count) {
    const auto [lost, n, s] = found[count - 1];
    depth = std::max(depth, n + 1);
    brought -= lost;
    // Where padding is computed anyway, nodes take its place.
    const int rows = outlook.packs ? size + count : size * (1 + depth);
    const double gained = outlook.packs ? brought : alike[depth - 1];
    const double spent = plan.verifying(rows) - plan.plain;
    const double worth = gained - plan.price * spent;
    const bool covered = !plan.asked || spent - plan.sure * gained <= stake_;
    if (worth > value && covered) {
      best = count;
      value = worth;
    }
  }
  std::vector<int> counts(chances.size());
  for (int i = 0; i < best; ++i) {
    const auto [lost, n, s] = found[i];
    counts[s] = n + 1;
  }
  if (!outlook.packs) {
    const int deepest = *std::max_element(counts.begin(), counts.end());
    for (size_t s = 0; s < counts.size(); ++s) {
      counts[s] = std::min(deepest, static_cast<int>(chances[s].size()));
    }
  }
  return counts;
}

}  // namespace inferlab::planner
