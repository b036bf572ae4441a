#include "acceptance.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace inferlab::planner {

int kind_of(double chance) {
  const double odds = std::log(std::max(chance, 1e-9) / std::max(1 - chance, 1e-9));
  return std::clamp(static_cast<int>((odds - kLowestOdds) * kKindStep), 0, kKinds - 1);
}

std::vector<int> kinds_of(const std::vector<double>& chances) {
  std::vector<int> kinds;
  for (const double chance : chances) kinds.push_back(kind_of(chance));
  return kinds;
}

Acceptance::Acceptance(std::vector<double> priors, double evidence)
    : priors_(std::move(priors)),
      accepted_(priors_.size()),
      offered_(priors_.size()),
      chances_(priors_.size()),
      weight_(std::max(kWeight, evidence)),
      observations_(evidence) {
  update_chances();
}

void Acceptance::update_chances() {
  const double trust = (kept_ + kTrust * unit_) / (promised_ + kTrust * unit_);
  const double weight = weight_ * unit_;
  for (size_t kind = 0; kind < priors_.size(); ++kind) {
    const double prior = std::min(priors_[kind] * trust, kMost);
    chances_[kind] =
        std::min((accepted_[kind] + prior * weight) / (offered_[kind] + weight), kMost);
  }
}

Acceptance::Own Acceptance::own(int64_t request) const {
  const auto found = own_.find(request);
  return found == own_.end() ? Own{} : found->second;
}

double Acceptance::factor(int64_t request) const {
  const Own mine = own(request);
  return (mine.accepted + kOwn) / (mine.expected + kOwn);
}

double Acceptance::known(int64_t request) const {
  const double expected = own(request).expected;
  return expected / (expected + kOwn);
}

double Acceptance::with_odds(double chance, double factor) {
  return std::min(chance * factor / (1 + chance * (factor - 1)), kMost);
}

double Acceptance::chance(int64_t request, int kind) const {
  return with_odds(chances_.at(kind), factor(request));
}

std::vector<double> Acceptance::of(int64_t request, const std::vector<int>& kinds) const {
  const double factor = this->factor(request);
  std::vector<double> chances;
  double least = 1;
  for (const int kind : kinds) {
    least = std::min(least, with_odds(chances_.at(kind), factor));
    chances.push_back(least);
  }
  return chances;
}

void Acceptance::count(double verified) { observations_ = observations_ * kForget + verified; }

void Acceptance::learn(const std::vector<int64_t>& requests,
                       const std::vector<std::vector<int>>& kinds,
                       const std::vector<std::vector<int>>& accepted) {
  double verified = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    const std::vector<int>& of_nodes = kinds[i];
    if (of_nodes.empty()) continue;
    const double news = 1 - known(requests[i]);
    const double unit = news * unit_;
    const auto walked = static_cast<double>(accepted[i].size());
    verified += news;
    double promised = 0, in_step = 0;
    for (const int kind : of_nodes) {
      offered_.at(kind) += unit;
      promised += priors_[kind];
      in_step += chances_[kind];
    }
    for (const int rank : accepted[i]) {
      if (rank >= 1 && rank <= static_cast<int>(of_nodes.size())) {
        accepted_[of_nodes[rank - 1]] += unit;
      }
    }
    promised_ += unit * promised;
    kept_ += unit * walked;
    const double weight = 1 / std::max(in_step, 1.0);
    Own& mine = own_[requests[i]];
    mine.accepted = mine.accepted * kOwnForget + weight * walked;
    mine.expected = mine.expected * kOwnForget + weight * in_step;
  }
  count(verified);
  unit_ /= std::pow(kForget, verified / std::max<double>(requests.size(), 1));
  if (unit_ > 1e9) {
    for (double& value : accepted_) value /= unit_;
    for (double& value : offered_) value /= unit_;
    promised_ /= unit_;
    kept_ /= unit_;
    unit_ = 1;
  }
  while (own_.size() > kMostRequests) own_.erase(own_.begin());
  update_chances();
}

}  // namespace inferlab::planner
