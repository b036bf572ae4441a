#include "ranks.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace inferlab::planner {

Ranks::Ranks(int nodes, std::vector<double> priors, double evidence)
    : priors_(std::move(priors)),
      accepted_(nodes),
      verified_(nodes),
      offered_(nodes),
      weight_(std::max(kWeight, evidence)) {
  priors_.resize(std::min<size_t>(priors_.size(), nodes));
  while (priors_.size() < static_cast<size_t>(nodes)) {
    priors_.push_back(priors_.empty() ? kHope : priors_.back() * kUnknown);
  }
  update_sums();
}

void Ranks::update_sums() {
  accepted_sums_.assign(1, 0.0);
  verified_sums_.assign(1, 0.0);
  double chance = 0, prior = 0;
  for (size_t rank = 0; rank < priors_.size(); ++rank) {
    // What was never tried is as likely, relative to the one before, as it was said.
    const double expected = rank == 0 ? priors_[0] : chance * priors_[rank] / prior;
    prior = std::max(priors_[rank], 1e-9);
    chance = (accepted_[rank] + weight_ * expected) / (offered_[rank] + weight_);
    accepted_sums_.push_back(accepted_sums_.back() + chance);
    verified_sums_.push_back(verified_sums_.back() +
                             (verified_[rank] + kWeight) / (offered_[rank] + kWeight));
  }
}

void Ranks::learn(int nodes, const std::vector<std::vector<int>>& accepted,
                  const std::vector<int>& kept, const std::vector<double>& news) {
  const int most = std::min<int>(nodes, static_cast<int>(priors_.size()));
  const double all_news = std::accumulate(news.begin(), news.end(), 0.0);
  const double forget = std::pow(kForget, all_news / std::max<double>(news.size(), 1));
  for (int rank = 0; rank < most; ++rank) {
    accepted_[rank] *= forget;
    verified_[rank] *= forget;
    offered_[rank] = offered_[rank] * forget + all_news;
  }
  for (size_t i = 0; i < accepted.size(); ++i) {
    for (const int rank : accepted[i]) {
      if (rank >= 1 && rank <= most) accepted_[rank - 1] += news[i];
    }
    const int count = std::min(kept.empty() ? most : kept[i], static_cast<int>(priors_.size()));
    for (int rank = 0; rank < count; ++rank) verified_[rank] += news[i];
  }
  update_sums();
}

}  // namespace inferlab::planner
