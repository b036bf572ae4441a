// What drafting promises: how far each budget gets a batch, and in what time.
#pragma once

#include <cstdint>
#include <vector>

#include "acceptance.h"
#include "budget.h"
#include "ranks.h"
#include "times.h"

namespace inferlab::planner {

constexpr int kSome = 64;  // tokens to come, where it is not said

// What a step is about to be: see `Outlook` in specdec/control.py.
struct Outlook {
  std::vector<int64_t> requests;
  double context = 0;
  std::vector<int> remaining;
  std::vector<int> unread;
  std::vector<int> able;     // by place
  std::vector<int> written;  // tokens of each that the target has chosen; empty: not known
  bool waiting = false;
  bool joining = false;
  bool packs = false;

  int size() const { return static_cast<int>(requests.size()); }
};

// What a drafter says of its nodes before any was verified: see `Known` in specdec/acceptance.py.
struct Known {
  std::vector<double> by_rank;
  std::vector<double> by_kind;
  double evidence = 0;
  bool asks = false;
  bool looks_up = false;
  bool examines = false;
};

// Of drafting for some of a batch, by rung.
struct Rates {
  double plain;                           // ms of a step without drafts
  std::vector<double> drafting;           // ms
  std::vector<double> ms;                 // of the whole step
  std::vector<double> rates;              // tokens per ms, that bring the end as near as tokens of
                                          // all sequences would
  std::vector<double> gains;              // plain steps that one is worth, beyond the first
  std::vector<std::vector<double>> pull;  // [B][rungs] a token's worth, relative to one for all
  double own;                             // what it is worth to its sequence alone

  int best() const;
  // The best rate with drafts, whether they pay or not, by that without.
  double hope() const;
};

// Of one drafter: its budgets, the first without drafts, what it says of its nodes, and what steps
// take.
class Prospects {
 public:
  Prospects(const std::vector<Budget>& rungs, const Known& known, StepTimes& times);

  // Drafting for these, by place.
  Rates rates(const Outlook& outlook, const std::vector<int>& members);
  // Of a plain step's time, what it takes for single sequences; 1 where each token counts.
  double own_share(const Outlook& outlook) const;
  // In [0, 1): how much is known of the drafter, and of what it does for these texts, by place.
  double certainty(const Outlook& outlook, const std::vector<int>& members) const;
  // How much of what is to be expected of a step is sure to come: the more is known, and the more
  // sequences there are to make up for each other's luck. What is well known is worth it on
  // average, whatever a single sequence's luck.
  static double sure(double certainty, int sequences);

  std::vector<int> nodes;  // by rung
  Acceptance acceptance;
  Ranks ranks;
  Onward onward;

 private:
  StepTimes& times_;
};

}  // namespace inferlab::planner
