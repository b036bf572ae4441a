#include "planner.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "stragglers.h"

namespace inferlab::planner {
namespace {

int largest(const std::vector<int>& values, int otherwise) {
  return values.empty() ? otherwise : *std::max_element(values.begin(), values.end());
}

// Of the target's forward; all that the budget allows where it is not told. Where a model `wrote`
// drafts, it is no plain step, though nothing of them was worth verifying.
int rows_of(const Step& step, bool wrote) {
  const int rows = step.rows > 0 ? step.rows : step.size * (1 + step.budget.nodes);
  return wrote ? std::max(rows, step.size + 1) : rows;
}

// The first of so many rungs that drafts and of which `holds` is true; 0: none.
template <typename Holds>
int first_rung(size_t rungs, Holds holds) {
  for (size_t rung = 1; rung < rungs; ++rung) {
    if (holds(rung)) return static_cast<int>(rung);
  }
  return 0;
}

}  // namespace

void Planner::climb(std::vector<Budget> rungs, const Known& known) {
  const std::lock_guard lock(mutex_);
  rungs_ = std::move(rungs);
  now_.reset();
  last_.clear();
  finds_ = kHopes;
  beside_ = 0;
  in_vain_ = rest_ = 0;
  times_.climb(rungs_);
  prospects_.emplace(rungs_, known, times_);
  known_ = known;
}

// What is asked before and while drafting.

Decision Planner::choose(Outlook outlook) {
  const std::lock_guard lock(mutex_);
  now_.reset();
  if (rungs_.size() == 1) return not_drafted(kSleep);
  if (rest_ > 0) {
    const int steps = std::min(rest_, kSleep);
    rest_ -= steps;
    return not_drafted(steps);
  }
  std::optional<Plan> plan = look(outlook);
  if (!plan) {
    Decision decision = not_drafted(std::min(asleep_, kSleep));
    const int heard = std::min(asleep_, largest(outlook.remaining, kSome));
    decision.gives_up = heard * times_.keeping_up(outlook.size()) > account_.may_lose(true);
    return decision;
  }
  if (is_due(outlook.size())) {
    return not_drafted(measured_ && promised_ >= kPlainly ? 1 : kPlainRow);
  }
  Decision decision{plan->rung, 1, false, plan->members,
                    known_.asks && !prospects_->acceptance.chances().empty()};
  now_.emplace(std::move(*plan), std::move(outlook), account_.may_lose(false));
  return decision;
}

Decision Planner::not_drafted(int steps) {
  Decision decision;
  decision.steps = std::max(steps, 1);
  return decision;
}

bool Planner::is_under_way(const std::vector<int64_t>& requests, const Check& check) const {
  if (!now_ || !now_->is_of(requests)) return false;
  if (check) check(prospects_->acceptance.chances().size(), prospects_->nodes.back());
  return true;
}

bool Planner::goes_on(const std::vector<int64_t>& requests, const std::vector<int>& kinds,
                      const Check& check) {
  const std::lock_guard lock(mutex_);
  return is_under_way(requests, check) && now_->goes_on(*prospects_, requests, kinds);
}

std::vector<int> Planner::keep(const std::vector<int64_t>& requests,
                               const std::vector<std::vector<int>>& kinds, const Check& check) {
  const std::lock_guard lock(mutex_);
  if (is_under_way(requests, check)) return now_->keep(*prospects_, requests, kinds);
  std::vector<int> all;
  for (const auto& of_one : kinds) all.push_back(static_cast<int>(of_one.size()));
  return all;
}

void Planner::followed(const std::vector<int64_t>& requests,
                       const std::vector<std::vector<int>>& kinds,
                       const std::vector<std::vector<int>>& accepted, const Check& check) {
  const std::lock_guard lock(mutex_);
  if (is_under_way(requests, check)) prospects_->acceptance.learn(requests, kinds, accepted);
}

bool Planner::examined(const std::vector<int64_t>& requests,
                       const std::vector<std::vector<double>>& sure,
                       const std::vector<std::vector<bool>>& right) {
  const std::lock_guard lock(mutex_);
  if (!is_under_way(requests, {}) || now_->outlook.unread.empty()) return true;
  if (now_->examined) return !now_->dismissed;
  if (prospects_->acceptance.chances().size() != kKinds) return true;  // they are kinds of its own
  size_t told = 0;
  for (size_t i = 0; i < requests.size(); ++i) {
    learn_examined(requests[i], sure[i], right[i]);
    told += sure[i].size();
  }
  if (told < kTold) return true;
  Plan before = std::move(now_->plan);
  Outlook outlook = std::move(now_->outlook);
  now_.reset();
  account_.ms -= times_.read(before.reading);
  for (const int place : before.members) outlook.unread.at(place) = 0;
  outlook.able = before.members;
  std::optional<Plan> plan = look(outlook);
  const bool dismissed = !plan || plan->tries;
  if (dismissed) {
    plan = std::move(before);
    if (hope_ < kNear) account_.ms = std::min(account_.ms, 0.0);  // it is known well enough
  }
  plan->reading = before.reading;
  now_.emplace(std::move(*plan), std::move(outlook), account_.may_lose(false));
  now_->examined = true;
  now_->dismissed = dismissed;
  return !dismissed;
}

void Planner::rested(int size, const std::vector<double>& ms, bool heard) {
  const std::lock_guard lock(mutex_);
  const double hearing = heard ? times_.keeping_up(size) : 0;
  for (const double of_one : ms) {
    if (!std::isfinite(of_one)) continue;
    account_.passed(of_one);
    account_.ms -= hearing;
    time_plain(size, of_one - hearing);
  }
}

// Of steps behind one that drafted, which plain ones take no more than, but perhaps less: it leaves
// little of the target in the caches, and others do meanwhile what it brought them to do.
void Planner::time_plain(int size, double ms) {
  if (plain_in_a_row_++ < kSettled) {
    times_.verified_beside(size, ms);
  } else {
    times_.verified(size, size, ms);
  }
}

// Whether plain steps are to be timed, although drafting pays.
bool Planner::is_due(int size) {
  Timed& timed =
      timed_.try_emplace(doublings(size), Timed{measured_ ? kPlainFirst : 1}).first->second;
  if (++timed.steps < timed.due) return false;
  timed.due = std::min(std::max(4 * timed.due, kPlainFirst), timed.steps + kPlainLast);
  return true;
}

// Opens the account of texts that are new.
void Planner::admit(const Outlook& outlook) {
  account_.admit(outlook.requests, largest(outlook.remaining, kSome),
                 times_.plain(outlook.size(), outlook.context));
}

// What is best as far as is known; nothing: not to draft.
std::optional<Plan> Planner::look(const Outlook& outlook) {
  const int size = outlook.size();
  Prospects& prospects = *prospects_;
  admit(outlook);
  int reading = 0, wait = 0;
  const std::vector<int> members = members_of(outlook, reading, wait);
  const Rates found = prospects.rates(outlook, members);
  const std::vector<double>& rates = found.rates;
  const double plain = found.plain;
  int best = found.best();
  int& last = last_[size];
  if (rates[best] < rates[last] * kMargin) best = last;
  if (rates[best] < rates[0] * kPrudence) best = 0;
  last = best;
  promised_ = rates[best] / rates[0];
  hope_ = found.hope();
  asleep_ = 0;
  // What the account gains by a plain step; of a drafter that hears of it, mostly nothing.
  const double saved_up =
      Account::kShare * plain - (outlook.unread.empty() ? times_.keeping_up(size) : 0);
  const auto sleep = [&](double ms) {
    asleep_ = static_cast<int>(std::clamp(ms / std::max(saved_up, 1e-9), 0.0, kNever));
    return std::nullopt;
  };
  if (members.empty()) {
    const std::optional<Plan> none = sleep(plain);
    if (wait > 0) asleep_ = wait;
    return none;
  }
  const int count = static_cast<int>(members.size());
  const std::vector<double>& times = times_.verify(size, outlook.context);
  // What a model writes takes a row at least, and leaves less of the target in the caches.
  const double row = known_.looks_up ? 0 : times[size + 1] - plain;
  const bool asked = known_.asks && (known_.looks_up || found.drafting[1] + row <= kCheap * plain);
  const bool tries = best == 0 && !asked;
  // What was lost says that not all that seems sure comes.
  const double debt = std::clamp(1 + account_.ms / (kDebt * plain), 0.0, 1.0);
  const double certainty = prospects.certainty(outlook, members);
  const double sure = debt * Prospects::sure(certainty, count);
  double loss = 0;
  if (!asked) {
    const double saved = plain - found.ms[best] / (1 + found.gains[best]);
    account_.expect(saved * largest(outlook.remaining, kSome), size, certainty);
    int needed = 1;  // the smallest that will do
    if (tries) {
      best = smallest_worth_trying(found);
      if (known_.asks) best = std::min(best, 1);
    } else if (known_.asks) {
      // A few levels that lose each time until all is lost would be worse than none; a few steps
      // with them, until the drafter is known, are not.
      best = smallest_that_pays(found);
      if (prospects.acceptance.certainty() >= kFairly) needed = best;
    }
    if (best == 0) return sleep(plain);
    best = covered(best, needed, found, sure, reading);
    if (best < needed) {
      return sleep(loss_of(needed, found, sure, reading) - account_.may_lose(true));
    }
    if (known_.asks) best = 1;  // the rest is asked for
    loss = loss_of(best, found, sure, reading);
  }
  if (known_.asks) best = static_cast<int>(rungs_.size()) - 1;
  const double brought = prospects.ranks.accepted()[prospects.nodes[best]] * count / size;
  Plan plan;
  plan.members = members;
  plan.rung = best;
  plan.times = times;
  plan.drafting = found.drafting;
  plan.plain = plain;
  // What a rate promises, counts as far as it is known.
  const double highest = *std::max_element(rates.begin(), rates.end()), least = size / plain;
  plan.price = least + prospects.acceptance.certainty() * std::max(highest - least, 0.0);
  if (asked) plan.price *= kPrudence;
  for (const auto& pull : found.pull) plan.worth.push_back(pull[best]);
  plan.worth_of = worth_of(found, best, members, brought);
  // Where each find is judged by itself, much of it is sure of a single one, too.
  const double known = kFind * prospects.acceptance.certainty();
  plan.sure = (asked ? std::max(sure, known) : sure) * plain / size;
  plan.loss = asked ? 0 : loss;
  plan.reading = reading;
  plan.tries = tries;
  plan.asked = asked;
  return plan;
}

bool Planner::follows(int tokens, const Outlook& outlook) {
  const std::lock_guard lock(mutex_);
  if (rungs_.size() == 1) return false;
  const int size = outlook.size();
  admit(outlook);
  std::vector<int> everyone(size);
  std::iota(everyone.begin(), everyone.end(), 0);
  const Rates found = prospects_->rates(outlook, everyone);
  const int best = found.best();
  const double gain = 1 + found.gains[best], cost = times_.read(tokens);
  const double saved = found.plain * gain / kPrudence - found.ms[best];
  const auto& remaining = outlook.remaining;
  const double steps = std::accumulate(remaining.begin(), remaining.end(), 0.0) / (size * gain);
  const double sure = prospects_->acceptance.certainty();
  if (saved * steps <= cost) {
    // Nothing to be gained, as far as is known: tried where it is all but free.
    if (cost + found.ms[1] - found.plain > account_.ms || sure >= 0.5) return false;
  } else if (cost * (1 - sure) > account_.ms ||
             covered(best, 1, found, Prospects::sure(sure, size), 0) == 0) {
    return false;
  }
  account_.ms -= cost * (1 - sure);
  return true;
}

// What is learnt from steps.

double Planner::observe(const Step& step) {
  const std::lock_guard lock(mutex_);
  std::optional<Drafting> now = std::move(now_);
  now_.reset();
  if (!std::isfinite(step.ms) || !std::isfinite(step.draft_ms)) return 0;
  // Near the end of all texts nothing is drafted, whatever was chosen; or it is another's step.
  if (step.budget == Budget{} || (now && now->outlook.size() != step.size)) now.reset();
  if (rungs_.size() == 1) return step.ms;
  account_.passed(step.ms);
  if (now && now->dismissed) {
    // A plain step, behind a reading that is paid for already.
    times_.drafted(static_cast<int>(now->plan.members.size()), {}, step.draft_ms,
                   now->plan.reading);
    return times_.step(step.size, step.size);
  }
  const int rows = rows_of(step, now && now->level > 0);
  bool in_vain = false;  // it was asked, and nothing else was done
  double tokens = 1;     // of plain steps that would have got as far
  double verify_ms = step.ms - step.draft_ms, drafting_ms = 0;
  if (now) {
    const Plan& plan = now->plan;
    in_vain = plan.asked && now->level == 0 && rows == step.size;
    if (plan.asked) rest_ = rest_behind(*now, step, in_vain);
    double brought = 0;
    for (int i = 0; i < step.size; ++i) brought += step.accepted[i].size() * plan.worth[i];
    tokens += brought / step.size;
    drafting_ms = plan.drafting[now->level > 0 ? now->level : plan.rung] + in_vain * beside(plan);
    if (step.caught_up && !now->examined) {
      // Reading is to pay in all steps to come, as far as that is known.
      const double unsure = plan.reading > 0 ? 1 - prospects_->acceptance.certainty() : 1;
      drafting_ms += unsure * (step.draft_ms - drafting_ms);
    }
  } else if (step.heard) {
    const double hearing = times_.keeping_up(step.size);
    verify_ms -= hearing;
    account_.ms -= hearing;
  }
  // Where a drafter read texts first, all else of the step was slow as well. And of a step that
  // asked in vain plain ones take no more, but perhaps less.
  if (rows > step.size || step.caught_up) {
    plain_in_a_row_ = 0;
    if (!step.caught_up) times_.verified(step.size, rows, verify_ms);
  } else if (in_vain) {
    times_.verified_beside(step.size, verify_ms);
  } else {
    time_plain(step.size, verify_ms);
  }
  if (now) {
    // What such steps take, as far as that is known by now: one may be slow by chance.
    account_.ms +=
        tokens * times_.step(step.size, step.size) - times_.step(step.size, rows) - drafting_ms;
    learn(*now, step);
  }
  return tokens * times_.step(step.size, step.size);
}

// Where drafting is all but free: for how many steps not to ask. For none while asking is worth its
// time on average; else the more, the more often in a row it was in vain.
int Planner::rest_behind(const Drafting& asked, const Step& step, bool in_vain) {
  const Plan& plan = asked.plan;
  // What is looked up takes longer where it is found; what is written, for each level.
  double asking = asked.level > 0 ? plan.drafting[asked.level] +
                                        plan.verifying(asked.outlook.size() + 1) - plan.plain
                                  : std::min(plan.drafting[1], step.draft_ms);
  if (asked.level == 0) {
    // Deciding and telling take their time, too: it shows where nothing else was done.
    const double more = (step.ms - step.draft_ms) / plan.plain - 1;
    if (in_vain) beside_ += kBeside * (std::clamp(more, -1.0, 1.0) - beside_);
    asking += beside(plan);
  }
  const double found = std::max(asked.value, 0.0) / plan.price;
  finds_ += kNews * (found / std::max(asking, 1e-6) - finds_);
  const bool vain = found < std::max(asking, plan.drafting[1]);
  in_vain_ = vain ? std::min(in_vain_ + 1, 16) : in_vain_ / 2;
  if (finds_ > kClearly) return 0;
  return static_cast<int>(std::min((1 << in_vain_) - 1.0, asking / (kInVain * plan.plain)));
}

// From each token on the chain that would have been drafted there, as far as the text goes.
void Planner::learn_examined(int64_t request, const std::vector<double>& sure,
                             const std::vector<bool>& right) {
  const size_t count = sure.size(), levels = rungs_.back().levels;
  for (size_t start = 0; start < count; ++start) {
    std::vector<int> kinds, walked;
    double path = 1;
    bool holds = true;
    for (size_t n = start; n < std::min(count, start + levels); ++n) {
      // Behind a wrong token its chain would go on otherwise, as sure as here, and in vain.
      kinds.push_back(kind_of(path *= sure[n]));
      holds = holds && right[n];
      if (holds) walked.push_back(static_cast<int>(kinds.size()));
    }
    const double news = 1 - prospects_->acceptance.known(request);
    prospects_->acceptance.learn({request}, {kinds}, {walked});
    prospects_->ranks.learn(static_cast<int>(kinds.size()), {walked}, {}, {news});
  }
}

// From a step that drafted.
void Planner::learn(const Drafting& now, const Step& step) {
  const std::vector<int>& members = now.plan.members;
  Acceptance& acceptance = prospects_->acceptance;
  std::vector<std::vector<int>> accepted;
  std::vector<int64_t> requests;
  std::vector<double> news;  // what is known of a text already tells nothing new of others
  for (const int place : members) {
    accepted.push_back(step.accepted[place]);
    requests.push_back(now.outlook.requests[place]);
    news.push_back(1 - acceptance.known(requests.back()));
  }
  if (now.judged && known_.looks_up) {
    // It says itself, at the next step, how far texts went along all that was looked up.
  } else if (now.judged) {
    std::vector<std::vector<int>> kinds = now.kinds, walked = accepted;
    for (size_t i = 0; i < kinds.size() && !step.came_true.empty(); ++i) {
      // The best node that was not verified: whether it was right is seen all the same.
      const std::optional<bool> right = step.came_true[members[i]];
      const size_t kept = kinds[i].size();
      if (!right || kept == now.offered[i].size()) continue;
      kinds[i].push_back(now.offered[i][kept]);
      if (*right) walked[i].push_back(static_cast<int>(kept) + 1);
    }
    acceptance.learn(requests, kinds, walked);
  } else {
    acceptance.count(static_cast<double>(members.size()));
  }
  if (step.budget == rungs_[now.plan.rung]) {
    std::vector<int> kept;
    for (const auto& kinds : now.kinds) kept.push_back(static_cast<int>(kinds.size()));
    prospects_->ranks.learn(step.budget.nodes, accepted, kept, news);
  }
  // Where it was asked, so many levels were drafted.
  const Budget drafted = now.level > 0 ? rungs_[now.level] : step.budget;
  times_.drafted(static_cast<int>(members.size()), drafted, step.draft_ms,
                 step.caught_up ? now.plan.reading : -1);
}

// How a choice is made.

// For whom to draft, by place, and how many tokens must be read for it; where nobody's text is old
// enough to tell of the drafter, how many steps to `wait`.
std::vector<int> Planner::members_of(const Outlook& outlook, int& reading, int& wait) {
  reading = wait = 0;
  const std::vector<int>& unread = outlook.unread;
  if (largest(unread, 0) <= kReady) return outlook.able;
  std::vector<int> members;
  std::vector<std::pair<int, int>> waiting;  // tokens, place
  for (const int i : outlook.able) {
    if (unread[i] <= kReady) {
      members.push_back(i);
    } else {
      waiting.emplace_back(unread[i], i);
    }
  }
  if (outlook.joining) return members;  // what pays, is up to how many will be there
  std::sort(waiting.begin(), waiting.end());
  const int size = outlook.size();
  std::vector<int> everyone(size);
  std::iota(everyone.begin(), everyone.end(), 0);
  const Rates found = prospects_->rates(outlook, everyone);
  const int best = found.best();
  const double gain = 1 + found.gains[best];
  const double saved = (found.plain * gain - found.ms[best]) / size;
  const double sure = prospects_->acceptance.certainty();
  const bool together = found.own < 1;
  const bool examines = known_.examines && !outlook.written.empty() && found.hope() >= kHopeful;
  const double share = sure > 0 ? kExamShare : 1;  // all of it where nothing is known
  const double worth_asking = std::max(kExamCost * found.plain, share * account_.ms);
  bool unsure = sure <= 0.5;
  double account = account_.ms;
  if (together && sure > 0.5) account += found.plain;
  std::vector<int> joined;
  for (const auto& [tokens, i] : waiting) {
    const double cost = times_.read(reading + tokens) - times_.read(reading);
    const int to_come = outlook.remaining.empty() ? kSome : outlook.remaining[i];
    const bool pays = saved * to_come / gain >= (1 + kReturn * (1 - sure)) * cost;
    if (examines && (pays || cost <= worth_asking) && !(pays && sure >= kFairly)) {
      // Reading it tells of it, once there is something to tell of.
      if (outlook.written[i] < kExam) {
        const int left = kExam - outlook.written[i];
        wait = wait > 0 ? std::min(wait, left) : left;
        continue;
      }
      unsure = true;
    } else if (!pays && (!members.empty() || !joined.empty() || sure > 0.5)) {
      break;
    }
    account -= cost * (1 - sure);
    if (account < 0) break;
    joined.push_back(i);
    reading += tokens;
  }
  if (together && joined.size() < waiting.size()) {
    // Who is left behind decides how many steps there are: one at most, to learn.
    joined.resize(members.empty() && unsure ? std::min<size_t>(joined.size(), 1) : 0);
    reading = joined.empty() ? 0 : unread[joined.front()];
  }
  members.insert(members.end(), joined.begin(), joined.end());
  std::sort(members.begin(), members.end());
  return members;
}

// The first rung that would pay if every level were accepted; 0: none.
int Planner::smallest_worth_trying(const Rates& found) const {
  return first_rung(rungs_.size(), [&](size_t rung) {
    return (1 + rungs_[rung].levels) * found.plain > found.ms[rung];
  });
}

// The first rung that is to pay; 0: none.
int Planner::smallest_that_pays(const Rates& found) const {
  return first_rung(rungs_.size(),
                    [&](size_t rung) { return found.rates[rung] >= found.rates[0] * kPrudence; });
}

// What a rung may lose, in ms: if only so much of what is gained comes as is `sure`.
double Planner::loss_of(int rung, const Rates& found, double sure, int reading) const {
  const double read = (1 - prospects_->acceptance.certainty()) * times_.read(reading);
  return found.ms[rung] - found.plain * (1 + sure * found.gains[rung]) + read;
}

// The largest rung up to this one whose possible loss the account covers, all of it for the
// smallest that will do; 0: none.
int Planner::covered(int rung, int smallest, const Rates& found, double sure, int reading) const {
  for (; rung > 0; --rung) {
    if (loss_of(rung, found, sure, reading) <= account_.may_lose(rung <= smallest)) break;
  }
  return rung;
}

// [n][member] of the n-th token that a step brings, where steps bring `brought`.
std::vector<std::vector<double>> Planner::worth_of(const Rates& found, int rung,
                                                   const std::vector<int>& members,
                                                   double brought) const {
  std::vector<std::vector<double>> worth;
  for (const double ahead : lead(prospects_->nodes.back(), brought)) {
    worth.emplace_back();
    for (const int i : members) {
      worth.back().push_back(found.own + ahead * (found.pull[i][rung] - found.own));
    }
  }
  return worth;
}

}  // namespace inferlab::planner
