// What drafting may cost before it is known to pay: of the time, in ms, that was lost against
// decoding plainly.
//
// New sequences are new luck: what is left of a share kFirst of the steps to come is filled up for
// each; what drafts gained for the ones before may be lost with them, too. kShare of all time is
// added, and what drafts gain, up to kSavings plain steps.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace inferlab::planner {

class Account {
 public:
  static constexpr double kFirst = 0.019;
  static constexpr double kLeast = 1.2;  // plain steps of it, however few are to come
  static constexpr double kMost = 4;     // and however many
  static constexpr double kShare = 0.004;
  static constexpr double kSavings = 8;
  static constexpr double kRisk = 0.5;   // of what drafting is expected to save, may be lost first
  static constexpr double kStake = 0.5;  // of what may be lost, by one step; all of it with the
                                         // smallest drafts
  double ms = 0;

  // Before a step with these sequences, which takes so long plainly; so many are to come.
  void admit(const std::vector<int64_t>& requests, int steps, double plain_ms) {
    ms = std::min(ms, kSavings * plain_ms);
    int64_t newest = newest_;
    double fresh = 0;
    for (const int64_t request : requests) {
      fresh += request > newest_;
      newest = std::max(newest, request);
    }
    newest_ = newest;
    const double first = std::clamp(kFirst * steps, kLeast, kMost) * plain_ms;
    ms += fresh / requests.size() * std::max(first - ms, 0.0);
  }

  // So much is expected to be saved until a batch of that size has ended: a part of it may be lost
  // first. The more sequences, the less it takes to tell luck from the lack of it.
  void expect(double saved_ms, int size, double certainty) {
    credit_ = std::max(kRisk * certainty * saved_ms / size, 0.0);
  }

  // So much time went by.
  void passed(double passed_ms) { ms += kShare * passed_ms; }

  // By one step, with as little drafted as can be, or more.
  double may_lose(bool smallest) const {
    return std::max(ms + credit_, 0.0) * (smallest ? 1.0 : kStake);
  }

 private:
  double credit_ = 0;
  int64_t newest_ = -1;  // the last request that was seen
};

}  // namespace inferlab::planner
