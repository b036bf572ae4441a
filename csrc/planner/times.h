// What steps of a running engine take: the cost model's times, corrected while it runs.
//
// What one kind of steps takes longer than another is lasting, and learnt of each kind. Beside it a
// machine that others use is slow for some steps, then fast again; that concerns all kinds, so it
// is told by the last few, whichever they were.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "budget.h"
#include "costs.h"

namespace inferlab::planner {

// Bits of a number: sizes of as many are alike.
int doublings(int size);

// How slow a machine is just now, relative to the times that are known of it.
class Pace {
 public:
  // A time, of whatever kind, and what it was to be at a factor of 1.
  void observe(double predicted, double measured);
  double factor() const { return factor_; }

 private:
  static constexpr size_t kLast = 3;

  std::vector<double> last_ = std::vector<double>(kLast);  // one step alone tells nothing
  double factor_ = 1.0;
};

// How far real times are from predicted ones, one kind more than another.
//
// What is of one kind is corrected by the median of its own last ratios and of 1, the fewer there
// are the more by what kinds have in common. Once is chance; two in a row that are far off in the
// same direction, and not by the machine's pace, say that times have changed, and what was before
// is forgotten.
class Drift {
 public:
  using Kind = uint64_t;

  // `apart`: it tells of other kinds only until there are observations of some of them.
  void observe(Kind kind, double predicted, double measured, double pace, bool apart = false);
  // What is measured is of something that takes longer.
  void bound(Kind kind, double predicted, double measured, double pace);
  double factor(Kind kind) const;
  int version() const { return version_; }  // changes with what is known

 private:
  struct Ratios {
    std::vector<double> logs;
    double middle = 0;
    bool apart = false;
    double off = 0;  // the last one's distance from it beyond the pace

    void add(double log, double pace);
  };

  static constexpr size_t kKept = 15;
  static constexpr double kFar = 0.47;    // log 1.6
  static constexpr double kShared = 1.5;  // weight of what is common, in observations
  static constexpr size_t kBounds = 5;    // so many tell that it is not more

  std::unordered_map<Kind, Ratios> of_kind_, above_;
  Ratios common_, apart_;
  int version_ = 0;
};

class StepTimes {
 public:
  StepTimes(StepCosts step, DraftCosts draft) : step_(std::move(step)), draft_(std::move(draft)) {}

  // From here on drafts are as large as these.
  void climb(const std::vector<Budget>& rungs);

  // What is predicted, in ms. A step's without drafting as the cost model has it, and corrected;
  // without drafts; and of all numbers of rows from 0 on, never falling.
  double model(int size, int rows) const;
  double step(int size, int rows) const;
  double plain(int size, double context);
  const std::vector<double>& verify(int size, double context);
  // By rung: what drafting for so many takes. And what a drafter takes to read so many tokens, and
  // to keep up with a step that drafts nothing.
  std::vector<double> draft(int members) const;
  double read(int tokens) const;
  double keeping_up(int size) const { return draft_.ms(size, 0); }

  // What was measured: a step's time without drafting, and what drafting took, with so many tokens
  // of whole texts read before; -1: as in a usual step, 0: the drafter was a little behind.
  void verified(int size, int rows, double ms);
  // A plain step with something else beside it: it takes no longer alone.
  void verified_beside(int size, double ms);
  void drafted(int members, Budget drafted, double ms, int read);

 private:
  struct Table {
    std::vector<double> ms;     // the model's
    std::vector<double> kinds;  // of all numbers of rows, with what is between them
    std::vector<double> corrected;
    int version = -1;
    double pace = 0;
  };

  static constexpr size_t kMostTables = 256;

  Drift::Kind kind_of_draft(int members, Budget drafted) const;

  StepCosts step_;
  DraftCosts draft_;
  double context_ = 0;  // tokens behind a sequence that were last asked about
  Pace pace_;
  Drift verifying_, drafting_, reading_;
  std::vector<Budget> rungs_;
  bool chains_ = false;
  std::map<std::pair<int, double>, Table> tables_;
};

}  // namespace inferlab::planner
