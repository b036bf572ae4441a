// Splits paged tree attention into tasks: (sequence, KV heads, block of rows), and where those are
// fewer than the threads can balance, also by split of the positions, merged in a second pass. The
// arithmetic of a row is the same either way. One task takes all KV heads while their rows are few:
// a slot's heads stand side by side in memory, and so are read together.
#include "inferlab/attention.h"

#include <algorithm>
#include <cstdint>

#include "arena.h"
#include "attention_task.h"
#include "attention_tasks.h"
#include "isa.h"
#include "parallel.h"

namespace inferlab::cpu {

INFERLAB_DECLARE_KERNEL(void, attention_block, const AttentionParams&, const AttentionTask&)
INFERLAB_DECLARE_KERNEL(void, attention_merge, const AttentionParams&, const AttentionTask&)

namespace {

constexpr int64_t kRowsPerBlock = 64;  // of one KV head
constexpr int64_t kRowsPerTask = 32;
constexpr int64_t kSharedWork = 16 * 1024;  // in `work`'s measure: some 15 us
// Where AMX takes the products, what of a slot is read at a time can be as long as streaming wants
// it.
constexpr int64_t kAmxRowsPerTask = 256;

void block_kernel(const AttentionParams& p, const AttentionTask& t) {
  INFERLAB_DISPATCH(attention_block, p, t);
}
void merge_kernel(const AttentionParams& p, const AttentionTask& t) {
  INFERLAB_DISPATCH(attention_merge, p, t);
}

}  // namespace

AttentionTasks::AttentionTasks(const AttentionParams& p, const int64_t* row_starts)
    : p_(p), row_starts_(row_starts) {
  if (p.batch == 0 || p.nodes == 0) return;
  const int64_t group = p.q_heads / p.kv_heads;
  int64_t positions = 0, longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t end = p.seq_lens[b] + p.node_offset + p.nodes;
    const int64_t seen = p.window > 0 ? std::min(end, p.window + p.nodes) : end;
    positions += seen;
    longest = std::max(longest, end);
  }
  const int64_t bytes = positions * p.kv_heads * 2 * page_head_bytes(p.format, p.head_dim, p.dtype);
  const int64_t products = positions * p.nodes * p.q_heads * p.head_dim * 2;
  work_ = (bytes + products) / 32;
  nodes_per_block_ = std::clamp<int64_t>(kRowsPerBlock / group, 1, p.nodes);
  if (work_ >= kSharedWork) {  // where sequences and heads are few: a block for each thread
    const int64_t shares = (num_threads() + p.batch * p.kv_heads - 1) / (p.batch * p.kv_heads);
    nodes_per_block_ = std::min(nodes_per_block_, (p.nodes + shares - 1) / shares);
  }
  const int64_t rows = nodes_per_block_ * group;
  blocks_ = (p.nodes + nodes_per_block_ - 1) / nodes_per_block_;
  splits_ = (longest + kSplit - 1) / kSplit;
  const bool amx = active_isa() == Isa::kAmx && p.dtype == DType::kBF16 &&
                   p.format == PageFormat::kSame && p.head_dim % kAmxChannels == 0;
  heads_per_task_ =
      std::clamp<int64_t>((amx ? kAmxRowsPerTask : kRowsPerTask) / rows, 1, p.kv_heads);
  const int64_t units = p.batch * blocks_ * splits_;
  const int64_t wanted = (2 * num_threads() + units - 1) / units;  // head groups, for balance
  if (wanted > 1) {
    heads_per_task_ = std::clamp<int64_t>((p.kv_heads + wanted - 1) / wanted, 1, heads_per_task_);
  }
  head_groups_ = (p.kv_heads + heads_per_task_ - 1) / heads_per_task_;
  state_floats_ = attention_state_floats(heads_per_task_ * rows, p.head_dim);
  scratch_floats_ =
      attention_scratch_floats(heads_per_task_, nodes_per_block_, group, p.head_dim, p.words);
  tasks_ = p.batch * head_groups_ * blocks_;
  split_ = tasks_ < 2 * num_threads() && splits_ > 1 && num_threads() > 1;
}

// Task index -> sequence, KV heads, block; later blocks, which see more, first.
AttentionTask AttentionTasks::task(int64_t i) const {
  AttentionTask t{};
  const int64_t block = blocks_ - 1 - i % blocks_;
  i /= blocks_;
  t.head_begin = i % head_groups_ * heads_per_task_;
  t.head_end = std::min(t.head_begin + heads_per_task_, p_.kv_heads);
  t.b = i / head_groups_;
  const int64_t nodes = row_starts_ != nullptr && p_.num_nodes != nullptr
                            ? static_cast<int64_t>(p_.num_nodes[t.b])
                            : p_.nodes;
  t.node_begin = block * nodes_per_block_;
  t.node_end = std::min(t.node_begin + nodes_per_block_, nodes);
  t.q_begin = row_starts_ != nullptr ? row_starts_[t.b] * p_.q_stride[1] : t.b * p_.q_stride[0];
  t.out_row = row_starts_ != nullptr ? row_starts_[t.b] : t.b * p_.nodes;
  t.split_begin = 0;
  t.split_end = splits_;
  return t;
}

bool AttentionTasks::call(AttentionTask t,
                          void (*kernel)(const AttentionParams&, const AttentionTask&)) const {
  if (t.node_begin >= t.node_end) return true;
  thread_local Arena scratch;
  t.scratch = scratch.get(scratch_floats_);
  if (t.scratch == nullptr) return false;
  kernel(p_, t);
  return true;
}

bool AttentionTasks::run(int64_t i, float* partials) const {
  if (!split_) return call(task(i), block_kernel);
  AttentionTask t = task(i / splits_);
  t.split_begin = i % splits_;
  t.split_end = t.split_begin + 1;
  t.partials = partials + i / splits_ * splits_ * state_floats_;
  return call(t, block_kernel);
}

bool AttentionTasks::merge(int64_t i, float* partials) const {
  AttentionTask t = task(i);
  t.partials = partials + i * splits_ * state_floats_;
  return call(t, merge_kernel);
}

Status paged_tree_attention(const AttentionParams& params) {
  thread_local Arena memory;
  const AttentionTasks tasks(params);
  float* partials = memory.get(tasks.partial_floats());
  if (partials == nullptr) return Status::kOutOfMemory;
  std::atomic<bool> ran{true};
  parallel_for(tasks.count(), tasks.work(), [&](int64_t i) {
    if (!tasks.run(i, partials)) ran.store(false, std::memory_order_relaxed);
  });
  parallel_for(tasks.merge_count(), tasks.partial_floats() * 4, [&](int64_t i) {
    if (!tasks.merge(i, partials)) ran.store(false, std::memory_order_relaxed);
  });
  return ran.load() ? Status::kOk : Status::kOutOfMemory;
}

}  // namespace inferlab::cpu
