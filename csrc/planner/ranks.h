// How often nodes are accepted by their rank, whatever else is known of them.
#pragma once

#include <vector>

namespace inferlab::planner {

// Shares of sequences in which the node of each rank was verified, and accepted.
class Ranks {
 public:
  static constexpr double kHope = 0.7;  // chance of the first node, before it is known

  // Of the largest tree the nodes below the root; of each rank the chance before anything was seen
  // (what is missing is assumed), and how many sequences that is worth, 0 where it was not
  // measured.
  Ranks(int nodes, std::vector<double> priors, double evidence = 0);

  // Nodes accepted, and verified, of the first n ranks, n from 0 on: per sequence.
  const std::vector<double>& accepted() const { return accepted_sums_; }
  const std::vector<double>& verified() const { return verified_sums_; }
  // Sequences in which the node of each rank was offered, forgetting.
  const std::vector<double>& offered() const { return offered_; }

  // A step with a budget of so many nodes for each of some sequences: the ranks of each that were
  // accepted, how many of each were verified (empty: all), and what each tells of the others, in
  // [0, 1]. A node that the drafter did not offer (no n-gram found, say) counts as not accepted.
  void learn(int nodes, const std::vector<std::vector<int>>& accepted, const std::vector<int>& kept,
             const std::vector<double>& news);

 private:
  static constexpr double kUnknown = 0.9;  // chance of the next node relative to the one before
  static constexpr double kForget = 0.98;  // weight of what was known, per step
  static constexpr double kWeight = 2;     // of a rank's prior at least, in sequences

  void update_sums();

  std::vector<double> priors_, accepted_, verified_, offered_;
  double weight_;
  std::vector<double> accepted_sums_, verified_sums_;
};

// What the next level of a chain is to be expected to bring, relative to the one before: told from
// the levels that drafts went on to.
class Onward {
 public:
  double share() const { return (there_ + kWeight * kHope) / (before_ + kWeight); }

  // Tokens to be expected of two successive levels.
  void observe(double before, double there) {
    before_ = kForget * before_ + before;
    there_ = kForget * there_ + there;
  }

 private:
  static constexpr double kForget = 0.99;
  static constexpr double kHope = 0.8;
  static constexpr double kWeight = 4;

  double before_ = 0, there_ = 0;
};

}  // namespace inferlab::planner
