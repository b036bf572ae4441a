// How likely draft nodes are to be accepted: what drafters know of them, calibrated.
//
// A drafter tells its nodes apart by kinds: how sure its model was of the path to a node, how long
// the match was that an n-gram hangs on and how deep the node is, or just its place in the order of
// worth. Each kind has a counter, so it does not matter how the drafter's own numbers are scaled:
//
//     chance(kind) = (accepted + kWeight prior trust) / (offered + kWeight)
//
// * accepted, offered: nodes of that kind that the walks went through, and all; both forgetting;
// * prior: what the drafter says of the kind before anything was seen;
// * trust: nodes of all kinds that were accepted, relative to what the priors had promised.
//
// A sequence's own chances have the odds of these, times the ratio of what was accepted of its
// nodes to what was expected of them, shrunk towards 1 where there is little evidence. A step's
// nodes stand or fall together, so they count for no more than one that was to be expected.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

namespace inferlab::planner {

// Kinds of nodes whose drafter knows their chances: bins of log odds.
constexpr int kKinds = 12;
constexpr double kKindStep = 1.2, kLowestOdds = -4;

// The kind of a node that its drafter gives this chance.
int kind_of(double chance);
std::vector<int> kinds_of(const std::vector<double>& chances);

class Acceptance {
 public:
  // Of each kind the chance before anything was seen, and how many observations that is worth.
  explicit Acceptance(std::vector<double> priors, double evidence = 0);

  // In [0, 1): how much of the chances is observation.
  double certainty() const { return observations_ / (observations_ + 8); }
  // Of each kind, of a sequence like all others.
  const std::vector<double>& chances() const { return chances_; }

  // How much larger the odds of a sequence's nodes are than their kinds say, and in [0, 1) how far
  // that is known: so much less its steps tell of others.
  double factor(int64_t request) const;
  double known(int64_t request) const;

  // Of one of a sequence's nodes; and of its nodes in the order of worth: falling.
  double chance(int64_t request, int kind) const;
  std::vector<double> of(int64_t request, const std::vector<int>& kinds) const;

  // A step in which drafts of so many sequences were verified.
  void count(double verified);
  // A step: of each request the kinds of the nodes that were verified, by rank, and which ranks,
  // from 1 on, its walk went through.
  void learn(const std::vector<int64_t>& requests, const std::vector<std::vector<int>>& kinds,
             const std::vector<std::vector<int>>& accepted);

 private:
  static constexpr double kMost = 0.99;    // no chance is above it
  static constexpr double kForget = 0.98;  // weight of what was known, per step
  static constexpr double kWeight = 6;     // of a kind's prior, in nodes
  static constexpr double kTrust = 4;      // of the priors all together, in accepted nodes
  static constexpr double kOwn = 6;  // of all sequences' chances against one's own, in nodes too
  static constexpr double kOwnForget = 0.9;
  static constexpr size_t kMostRequests = 4096;

  struct Own {
    double accepted = 0;
    double expected = 0;
  };

  void update_chances();
  Own own(int64_t request) const;
  static double with_odds(double chance, double factor);

  std::vector<double> priors_, accepted_, offered_, chances_;
  double weight_;
  double promised_ = 0, kept_ = 0;
  std::map<int64_t, Own> own_;
  double unit_ = 1;      // weight of an observation now: instead of making the old ones lighter
  double observations_;  // sequences whose drafts were verified, forgetting
};

}  // namespace inferlab::planner
