// A step that drafts: what was decided for it, and what its drafts are worth meanwhile.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "prospects.h"

namespace inferlab::planner {

// What was decided for a step.
struct Plan {
  std::vector<int> members;      // for whom is drafted, by place
  int rung = 0;                  // of the ladder, at most
  std::vector<double> times;     // ms of verifying, by rows
  std::vector<double> drafting;  // ms, by rung
  double plain = 0;              // ms of a step without drafts
  double price = 0;              // tokens per ms
  std::vector<double> worth;     // of a token of each sequence, relative to one for all
  std::vector<std::vector<double>> worth_of;  // [n][member] of the n-th token that a step brings
  double sure = 0;     // ms that are sure to be saved for each accepted token to be expected
  double loss = 0;     // ms, if only what is sure comes
  int reading = 0;     // tokens that the drafter reads first
  bool tries = false;  // to learn, not to gain
  bool asked = false;  // drafting is all but free: what it finds decides

  double verifying(int rows) const { return times[std::min<size_t>(rows, times.size() - 1)]; }
};

// The step under way, which may lose so many ms (`stake`). What a judge is asked: see `Judge` in
// specdec/control.py.
class Drafting {
 public:
  Drafting(Plan plan, Outlook outlook, double stake);

  // Whether it is these that are drafted for.
  bool is_of(const std::vector<int64_t>& requests) const;

  bool goes_on(Prospects& prospects, const std::vector<int64_t>& requests,
               const std::vector<int>& kinds);
  std::vector<int> keep(const Prospects& prospects, const std::vector<int64_t>& requests,
                        const std::vector<std::vector<int>>& drafted);

  Plan plan;
  Outlook outlook;
  int level = 0;           // drafted so far
  double value = 0;        // tokens that the drafts are worth, less what verifying them costs
  bool judged = false;     // it was asked what to keep
  bool examined = false;   // it was told what its drafts would have been, so far,
  bool dismissed = false;  // and they are not worth it
  std::vector<std::vector<int>> offered;  // the kinds of what was drafted,
  std::vector<std::vector<int>> kinds;    // and of the nodes that are verified

 private:
  std::vector<int> worth_verifying(std::vector<std::vector<double>> chances);

  double stake_;
  double left_;
  double above_ = 0;  // what the last level's tokens would be worth if they were the next's
};

}  // namespace inferlab::planner
