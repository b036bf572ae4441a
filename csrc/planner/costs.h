// What steps cost, as measured and fitted by specdec/costs.py, where the formula is written.
#pragma once

#include <utility>
#include <vector>

namespace inferlab::planner {

// Points of growing x, and the lines between them; beyond the last as from the last but one, before
// the first flat.
class Line {
 public:
  Line() = default;
  Line(std::vector<double> xs, std::vector<double> ys);

  bool empty() const { return xs_.empty(); }
  double at(double x) const;

 private:
  std::vector<double> xs_;
  std::vector<double> ys_;
};

// Of verifying.
struct StepCosts {
  Line own;  // ms by rows
  double per_sequence = 0;
  double per_key = 0;
  double per_product = 0;

  // With so many rows in all, which may be a mean.
  double ms(int batch, double rows, double context) const;
};

// What drafting adds.
struct DraftCosts {
  std::vector<double> batches;
  std::vector<Line> by_batch;  // ms by nodes
  Line reading;                // ms by tokens
  double slowed = 1;           // times as long takes all else of a step that drafts

  // With a budget of so many nodes, which may be a mean.
  double ms(int batch, double nodes) const;
  // Reading so many tokens, of however many texts.
  double reading_ms(int tokens) const;
};

}  // namespace inferlab::planner
