// A product in tasks that any threads may run in any order: for linear, and for the decoder, whose
// threads go through all of its products together.
#pragma once

#include <cstdint>

#include "inferlab/linear.h"

namespace inferlab::cpu {

class LinearTasks {
 public:
  LinearTasks() = default;
  explicit LinearTasks(const LinearParams& params);

  // The weight's, times what rows add: for parallel_for.
  int64_t bytes() const { return bytes_; }
  // What rows are widened or laid out in before the tasks run, 64-byte aligned; 0: they are not.
  int64_t scratch_floats() const { return scratch_floats_; }
  void prepare(float* scratch) const;

  int64_t count() const { return count_; }
  void run(int64_t task, const float* scratch) const;

 private:
  LinearParams p_{};
  int64_t bytes_ = 0, chunk_ = 0, count_ = 0, scratch_floats_ = 0;
};

}  // namespace inferlab::cpu
