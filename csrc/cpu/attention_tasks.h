// Paged tree attention in tasks that any threads may run in any order: for paged_tree_attention,
// and for the decoder, whose threads go through all of its layers together.
#pragma once

#include <atomic>
#include <cstdint>

#include "attention_task.h"
#include "inferlab/attention.h"

namespace inferlab::cpu {

class AttentionTasks {
 public:
  AttentionTasks() = default;
  // `row_starts` [B]: the first row of each sequence in q and out, which then hold the rows that
  // `num_nodes` counts alone, one sequence behind the other; null: N rows each.
  explicit AttentionTasks(const AttentionParams& params, const int64_t* row_starts = nullptr);

  // In parallel_for's measure, where less than 64 KB, here about 60 us, is not worth a second
  // thread.
  int64_t work() const { return work_; }
  // Where positions are split over tasks: floats for what they find, which merging needs. 0: none.
  int64_t partial_floats() const { return split_ ? tasks_ * splits_ * state_floats_ : 0; }

  int64_t count() const { return split_ ? tasks_ * splits_ : tasks_; }
  int64_t merge_count() const { return split_ ? tasks_ : 0; }
  // False: no memory.
  bool run(int64_t task, float* partials) const;
  bool merge(int64_t task, float* partials) const;

 private:
  AttentionTask task(int64_t i) const;
  bool call(AttentionTask t, void (*kernel)(const AttentionParams&, const AttentionTask&)) const;

  AttentionParams p_{};
  const int64_t* row_starts_ = nullptr;
  int64_t nodes_per_block_ = 0, blocks_ = 0, heads_per_task_ = 0, head_groups_ = 0, splits_ = 0;
  int64_t state_floats_ = 0, scratch_floats_ = 0, tasks_ = 0, work_ = 0;
  bool split_ = false;
};

}  // namespace inferlab::cpu
