// The controller that knows what steps cost: it drafts where that pays, at a bounded price.
//
// Each step takes draft nodes while the tokens to be expected of them are worth their time. The
// price of a millisecond is the rate of the best budget, in tokens per ms, plain decoding among
// them: how far it gets the batch (`Prospects`), over the time of the cost model, corrected by how
// far steps were off lately. At that price a draft model goes on to the next level while what it
// may bring to all sequences is worth its forward, and of the nodes of all sequences those are
// verified, likeliest first, whose chance is worth the rows they add (`Drafting`).
//
// What is not drafted teaches nothing, and what was promised may not come. So there is an `Account`
// of the time that was lost against decoding plainly: a step is taken only while it covers what is
// lost if only the sure part of the gain comes. Texts that the drafter would first have to read are
// weighed by the tokens still to come. Where drafting is all but free, what it finds decides: where
// that is worth nothing, it rests for ever more steps. Where drafting pays, a plain step is timed
// now and then; at first where costs are not known.
//
// All of it takes a few microseconds: the steps of small models take no more than a millisecond.
//
// It may serve several engines, also of several threads. It then learns of all of them, as long as
// their drafters have equal ladders and say the same of their nodes: with another, chances begin
// anew. Of a step that another engine's came between, it judges no drafts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <vector>

#include "account.h"
#include "drafting.h"
#include "judge.h"
#include "prospects.h"
#include "times.h"

namespace inferlab::planner {

struct Decision {
  int rung = 0;   // 0: nothing is drafted
  int steps = 1;  // of this batch, for which that holds: it need not be asked or told of the others
  bool gives_up = false;  // hearing of these texts until they might be drafted for costs too much
  std::vector<int> members;
  bool judged = false;  // drafts are to be told while they are made
};

// What a step told: see `StepObservation` in specdec/control.py.
struct Step {
  int size = 0;
  Budget budget;
  double ms = 0;
  std::vector<std::vector<int>> accepted;
  bool caught_up = false;
  int rows = 0;
  double draft_ms = 0;
  bool heard = false;
  std::vector<std::optional<bool>> came_true;
};

class Planner : public Judge {
 public:
  // What steps take, and whether that was measured.
  Planner(StepCosts step, DraftCosts draft, bool measured)
      : times_(std::move(step), std::move(draft)), measured_(measured) {}
  Planner(const Planner&) = delete;

  // A drafter: its budgets, the first without drafts, and what it says of its nodes.
  void climb(std::vector<Budget> rungs, const Known& known);

  Decision choose(Outlook outlook);
  // `check` is told how many kinds and nodes there are, where the step is the one under way.
  using Check = std::function<void(size_t kinds, size_t nodes)>;
  bool goes_on(const std::vector<int64_t>& requests, const std::vector<int>& kinds,
               const Check& check);
  bool goes_on(const std::vector<int64_t>& requests, const std::vector<int>& kinds) override {
    return goes_on(requests, kinds, {});
  }
  std::vector<int> keep(const std::vector<int64_t>& requests,
                        const std::vector<std::vector<int>>& kinds, const Check& check);
  std::vector<int> keep(const std::vector<int64_t>& requests,
                        const std::vector<std::vector<int>>& kinds) override {
    return keep(requests, kinds, {});
  }
  // What became of drafts that were looked up for these texts at an earlier step, verified or not.
  void followed(const std::vector<int64_t>& requests, const std::vector<std::vector<int>>& kinds,
                const std::vector<std::vector<int>>& accepted, const Check& check);
  void followed(const std::vector<int64_t>& requests, const std::vector<std::vector<int>>& kinds,
                const std::vector<std::vector<int>>& accepted) override {
    followed(requests, kinds, accepted, {});
  }
  // What drafts of texts that were just read would have been: of each of their last tokens how sure
  // the drafter was of its own, and whether it was that token. Whether to draft, all told.
  bool examined(const std::vector<int64_t>& requests, const std::vector<std::vector<double>>& sure,
                const std::vector<std::vector<bool>>& right) override;
  // Learns from a step; returns the ms that plain decoding would have taken to get as far.
  double observe(const Step& step);
  // What steps without drafts took that it was not told of one by one; `heard`: with the drafter
  // keeping up.
  void rested(int size, const std::vector<double>& ms, bool heard);
  // Whether the drafter is to hear of texts that are about to be read, so many tokens in all, so
  // that it can draft for them.
  bool follows(int tokens, const Outlook& outlook);

  double promised() const { return promised_; }  // the best rate by that of plain decoding
  double account_ms() const { return account_.ms; }
  Prospects& prospects() { return prospects_.value(); }

 private:
  static constexpr double kReturn = 4;      // times more than it takes, must texts promise to be
                                            // read, as far as it is not known whether that comes
  static constexpr double kCheap = 0.1;     // plain steps: so cheap drafts show if they pay
  static constexpr double kInVain = 0.01;   // of all time, for drafting that finds nothing
  static constexpr double kFind = 0.8;      // of what a judged draft promises, is sure at most
  static constexpr double kDebt = 4;        // plain steps lost, and no gain is sure any longer
  static constexpr int kExam = 8;           // tokens of a text that tell of an unknown drafter
  static constexpr size_t kTold = 4;        // of fewer nothing is decided
  static constexpr double kHopeful = 0.75;  // of the plain rate: so good drafts may pay for a text,
  static constexpr double kNear = 0.95;     // and so good ones are tried again soon
  static constexpr double kExamCost = 0.75;  // plain steps that reading them may take,
  static constexpr double kExamShare = 0.5;  // or of what may be lost
  static constexpr double kFairly = 0.3;     // certainty of a drafter that is known somewhat
  static constexpr double kNews = 0.03;      // weight of the last time it was asked
  static constexpr double kHopes = 0.9;      // what asking saves, over what it takes, before it
                                             // is known
  static constexpr double kClearly = 0.6;    // of what asking takes, and it does not pay
  static constexpr double kNever = 1e6;      // steps
  static constexpr double kBeside = 0.1;     // weight of the last time asking was in vain
  static constexpr double kMargin = 1.02;    // what another rung must promise to be taken
  static constexpr double kPrudence = 1.05;  // and drafts over plain decoding: not all is in the
                                             // model
  static constexpr int kReady = 16;  // tokens that a drafter catches up with in a usual step
  static constexpr int kSleep = 32;  // steps without drafts that are decided on at once, at most
  static constexpr int kPlainFirst = 8;    // drafted steps until plain ones are timed; then four
  static constexpr int kPlainLast = 256;   // times as many, up to so many more
  static constexpr int kSettled = 2;       // plain steps in a row until they are as fast as ever:
  static constexpr int kPlainRow = 4;      // so many are timed, but one where drafting promises
  static constexpr double kPlainly = 1.5;  // more than so many times the plain rate

  struct Timed {  // when the next plain step is due, in steps that were to draft
    int due;
    int steps = 0;
  };

  void admit(const Outlook& outlook);
  std::optional<Plan> look(const Outlook& outlook);
  static Decision not_drafted(int steps);
  bool is_due(int size);
  void time_plain(int size, double ms);
  std::vector<int> members_of(const Outlook& outlook, int& reading, int& wait);
  int smallest_worth_trying(const Rates& found) const;
  int smallest_that_pays(const Rates& found) const;
  double loss_of(int rung, const Rates& found, double sure, int reading) const;
  int covered(int rung, int smallest, const Rates& found, double sure, int reading) const;
  std::vector<std::vector<double>> worth_of(const Rates& found, int rung,
                                            const std::vector<int>& members, double brought) const;
  double beside(const Plan& plan) const { return std::max(beside_, 0.0) * plan.plain; }
  int rest_behind(const Drafting& asked, const Step& step, bool in_vain);
  bool is_under_way(const std::vector<int64_t>& requests, const Check& check) const;
  void learn(const Drafting& now, const Step& step);
  void learn_examined(int64_t request, const std::vector<double>& sure,
                      const std::vector<bool>& right);

  std::mutex mutex_;
  StepTimes times_;
  bool measured_;
  Known known_;  // of the drafter
  Account account_;
  std::vector<Budget> rungs_{Budget{}};
  std::optional<Prospects> prospects_;
  std::optional<Drafting> now_;
  std::map<int, Timed> timed_;     // by doublings of the batch size
  std::map<int, int> last_;        // by batch size, the rung taken last
  double finds_ = kHopes;          // what asking saves, over what it takes, on average
  double beside_ = 0;              // plain steps that asking takes beside drafting, on average
  int in_vain_ = 0;                // steps in a row that found nothing,
  int rest_ = 0;                   // and so many to rest
  int asleep_ = 0;                 // steps until the account might cover a try
  int plain_in_a_row_ = kSettled;  // steps, up to the last one
  double promised_ = 1;
  double hope_ = 1;  // of the last look, see `Rates`
};

}  // namespace inferlab::planner
