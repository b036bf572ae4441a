#include "times.h"

#include <algorithm>
#include <cmath>

namespace inferlab::planner {

int doublings(int size) {
  int count = 0;
  for (; size > 0; size >>= 1) ++count;
  return count;
}

namespace {

double rounded(double context) { return 64 * std::nearbyint(context / 64); }

double halves(int size, double rows) { return 2 * std::log2(rows / size); }

// Steps that are off alike: sequences by doublings, and rows for each by halves of them.
Drift::Kind kind_of(int size, int half) {
  return static_cast<Drift::Kind>(doublings(size)) << 32 | static_cast<uint32_t>(half + 1);
}

Drift::Kind kind_of_step(int size, int rows) {
  return kind_of(size, rows > size ? static_cast<int>(std::nearbyint(halves(size, rows))) : -1);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 ? values[half] : 0.5 * (values[half - 1] + values[half]);
}

void keep_last(std::vector<double>& values, size_t count) {
  if (values.size() > count) values.erase(values.begin(), values.end() - count);
}

}  // namespace

void Pace::observe(double predicted, double measured) {
  if (std::min(predicted, measured) <= 0) return;
  last_.push_back(std::log(measured / predicted));
  keep_last(last_, kLast);
  factor_ = std::exp(median(last_));
}

void Drift::Ratios::add(double log, double pace) {
  const double before = std::exchange(off, log - middle - pace);
  logs.push_back(log);
  keep_last(logs, kKept);
  if (logs.size() > 3 && std::min(std::abs(off), std::abs(before)) > kFar && off * before > 0) {
    keep_last(logs, 2);
  }
  std::vector<double> known = logs;
  if (logs.size() == 1) known[0] = std::clamp(log, -kFar, kFar);
  known.push_back(0);
  middle = median(std::move(known));
}

void Drift::observe(Kind kind, double predicted, double measured, double pace, bool apart) {
  if (std::min(predicted, measured) <= 0) return;
  const double log = std::log(measured / predicted);
  Ratios& own = of_kind_[kind];
  own.apart = apart;
  own.add(log, std::log(pace));
  (apart ? apart_ : common_).add(log, std::log(pace));
  ++version_;
}

void Drift::bound(Kind kind, double predicted, double measured, double pace) {
  if (std::min(predicted, measured) <= 0) return;
  above_[kind].add(std::log(measured / predicted), std::log(pace));
  ++version_;
}

double Drift::factor(Kind kind) const {
  const auto found = of_kind_.find(kind);
  const bool seen = found != of_kind_.end();
  const double own = seen ? found->second.logs.size() : 0, middle = seen ? found->second.middle : 0;
  double shared = common_.middle;
  if (!seen || !found->second.apart) {
    const double count = common_.logs.size();
    shared = (count * shared + kShared * apart_.middle) / (count + kShared);
  }
  const double known = (own * middle + kShared * shared) / (own + kShared);
  const auto above = above_.find(kind);
  if (above == above_.end() || above->second.logs.size() < kBounds) return std::exp(known);
  return std::exp(std::min(known, above->second.middle));
}

void StepTimes::climb(const std::vector<Budget>& rungs) {
  rungs_ = rungs;
  chains_ = std::all_of(rungs.begin(), rungs.end(),
                        [](const Budget& budget) { return budget.levels == budget.nodes; });
  tables_.clear();
}

double StepTimes::model(int size, int rows) const {
  return std::max(step_.ms(size, rows, context_) * (rows > size ? draft_.slowed : 1.0), 1e-6);
}

double StepTimes::step(int size, int rows) const {
  return model(size, rows) * pace_.factor() * verifying_.factor(kind_of_step(size, rows));
}

double StepTimes::plain(int size, double context) {
  context_ = rounded(context);
  return step(size, size);
}

const std::vector<double>& StepTimes::verify(int size, double context) {
  context_ = rounded(context);
  if (tables_.size() > kMostTables) tables_.clear();
  Table& table = tables_[{size, context_}];
  const int most = size * (1 + rungs_.back().nodes);
  if (table.ms.empty()) {
    for (int n = 0; n <= most; ++n) {
      const int rows = std::max(n, size);
      table.ms.push_back(model(size, rows));
      table.kinds.push_back(rows == size ? 0.0 : halves(size, rows) + 1);
    }
  }
  if (table.version == verifying_.version() && table.pace == pace_.factor()) {
    return table.corrected;
  }
  table.version = verifying_.version();
  table.pace = pace_.factor();
  std::vector<double> factors;
  const int kinds = static_cast<int>(std::nearbyint(table.kinds.back())) + 1;
  for (int i = 0; i < kinds; ++i) {
    factors.push_back(table.pace * verifying_.factor(kind_of(size, i - 1)));
  }
  table.corrected.resize(table.ms.size());
  double highest = 0;
  for (size_t n = 0; n < table.ms.size(); ++n) {
    // Between kinds on a line: it is differences that decide.
    const double kind = std::min(table.kinds[n], kinds - 1.0);
    const int below = std::min(static_cast<int>(kind), std::max(kinds - 2, 0));
    const double part = kind - below;
    const double above = factors[std::min(below + 1, kinds - 1)];
    const double factor = factors[below] + (above - factors[below]) * part;
    table.corrected[n] = highest = std::max(highest, table.ms[n] * factor);
  }
  return table.corrected;
}

std::vector<double> StepTimes::draft(int members) const {
  std::vector<double> ms;
  for (const Budget& rung : rungs_) {
    const double factor = drafting_.factor(kind_of_draft(members, rung)) * pace_.factor();
    ms.push_back(members > 0 ? draft_.ms(members, rung.nodes) * factor : 0.0);
  }
  return ms;
}

double StepTimes::read(int tokens) const {
  return draft_.reading_ms(tokens) * pace_.factor() * reading_.factor(0);
}

void StepTimes::verified(int size, int rows, double ms) {
  const Drift::Kind kind = kind_of_step(size, rows);
  const double usual = model(size, rows);
  pace_.observe(usual * verifying_.factor(kind), ms);
  // Plain steps are the most: what is common to steps that draft, is told by those, once there are
  // some.
  verifying_.observe(kind, usual, ms, pace_.factor(), rows == size);
}

void StepTimes::verified_beside(int size, double ms) {
  verifying_.bound(kind_of_step(size, size), model(size, size), ms, pace_.factor());
}

void StepTimes::drafted(int members, Budget drafted, double ms, int read) {
  const double usual = draft_.ms(members, drafted.nodes), pace = pace_.factor();
  const Drift::Kind kind = kind_of_draft(members, drafted);
  if (read < 0) {
    drafting_.observe(kind, usual, ms, pace);
  } else {
    const double reading = std::max(ms - usual * pace * drafting_.factor(kind), 1e-6);
    reading_.observe(0, draft_.reading_ms(read), reading, pace);
  }
}

// Levels of chains take the same each, so chains of any length are off alike.
Drift::Kind StepTimes::kind_of_draft(int members, Budget drafted) const {
  const Drift::Kind size = static_cast<Drift::Kind>(doublings(members)) << 32;
  return chains_ ? size : size | static_cast<uint32_t>(drafted.levels + 1) << 16 | drafted.nodes;
}

}  // namespace inferlab::planner
