// Mixtures of experts (Shazeer et al., 2017): which experts the rows of a layer are sent to, and
// the products of each expert with its rows, as tasks that any threads may run in any order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "inferlab/decoder.h"
#include "linear_tasks.h"

namespace inferlab::cpu {

// Products of several experts, each with its own rows.
class ExpertProducts {
 public:
  void clear() {
    parts_.clear();
    first_task_.assign(1, 0);
    first_float_.assign(1, 0);
  }

  void add(const LinearTasks& product) {
    parts_.push_back(product);
    first_task_.push_back(first_task_.back() + parts_.back().count());
    first_float_.push_back(first_float_.back() + (parts_.back().scratch_floats() + 15) / 16 * 16);
  }

  int64_t parts() const { return static_cast<int64_t>(parts_.size()); }
  int64_t scratch_floats() const { return first_float_.back(); }
  int64_t count() const { return first_task_.back(); }

  void prepare(int64_t part, float* scratch) const {
    if (parts_[part].scratch_floats() > 0) parts_[part].prepare(scratch + first_float_[part]);
  }

  void run(int64_t task, const float* scratch) const {
    const auto behind = std::upper_bound(first_task_.begin(), first_task_.end(), task);
    const int64_t part = behind - first_task_.begin() - 1;
    parts_[part].run(task - first_task_[part], scratch + first_float_[part]);
  }

 private:
  std::vector<LinearTasks> parts_;
  std::vector<int64_t> first_task_{0}, first_float_{0};
};

// Each row has a slot for each of its experts. Slots stand at places by expert, those of one side
// by side, so that an expert's rows are one matrix.
class ExpertRows {
 public:
  void resize(int64_t slots) {
    expert_.resize(slots);
    weight_.resize(slots);
    place_.resize(slots);
    row_at_.resize(slots);
  }

  // The likeliest experts of a row, in the order of their numbers, by the router's logits [count].
  template <typename T>
  void choose(const Experts& experts, const T* logits, int64_t row) {
    int64_t* chosen = expert_.data() + row * experts.chosen;
    float* weights = weight_.data() + row * experts.chosen;
    float most = to_float(logits[0]), total = 0.0f, kept = 0.0f;
    for (int64_t e = 1; e < experts.count; ++e) most = std::max(most, to_float(logits[e]));
    for (int64_t e = 0; e < experts.count; ++e) total += std::exp(to_float(logits[e]) - most);
    for (int64_t i = 0; i < experts.chosen; ++i) {
      int64_t best = -1;
      for (int64_t e = 0; e < experts.count; ++e) {
        if (std::find(chosen, chosen + i, e) != chosen + i) continue;
        if (best < 0 || to_float(logits[e]) > to_float(logits[best])) best = e;
      }
      chosen[i] = best;
    }
    std::sort(chosen, chosen + experts.chosen);
    for (int64_t i = 0; i < experts.chosen; ++i) {
      weights[i] = std::exp(to_float(logits[chosen[i]]) - most) / total;
      kept += weights[i];
    }
    for (int64_t i = 0; i < experts.chosen; ++i) {
      if (experts.normed) weights[i] /= kept;
      if (experts.rounded) weights[i] = to_float(from_float<T>(weights[i]));
    }
  }

  // Gives slots their places. body(expert, first place, places) for each expert that has any.
  template <typename F>
  void group(const Experts& experts, int64_t rows, const F& body) {
    const int64_t slots = rows * experts.chosen;
    begins_.assign(experts.count + 1, 0);
    for (int64_t slot = 0; slot < slots; ++slot) ++begins_[expert_[slot] + 1];
    for (int64_t e = 0; e < experts.count; ++e) begins_[e + 1] += begins_[e];
    next_.assign(begins_.begin(), begins_.end() - 1);
    for (int64_t slot = 0; slot < slots; ++slot) {
      place_[slot] = next_[expert_[slot]]++;
      row_at_[place_[slot]] = slot / experts.chosen;
    }
    for (int64_t e = 0; e < experts.count; ++e) {
      if (begins_[e + 1] > begins_[e]) body(e, begins_[e], begins_[e + 1] - begins_[e]);
    }
  }

  int64_t row_at(int64_t place) const { return row_at_[place]; }
  int64_t place(int64_t slot) const { return place_[slot]; }
  float weight(int64_t slot) const { return weight_[slot]; }

 private:
  std::vector<int64_t> expert_, place_, row_at_, begins_, next_;
  std::vector<float> weight_;
};

// A layer's own: who comes late to its stages must find them as they were planned.
struct LayerExperts {
  ExpertRows rows;
  ExpertProducts up, down;
};

}  // namespace inferlab::cpu
