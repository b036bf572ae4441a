// Splits paged tree attention into tasks: (sequence, KV heads, block of rows), and where those are
// fewer than the threads can balance, also by split of the positions, merged in a second pass. The
// arithmetic of a row is the same either way. One task takes all KV heads while their rows are few:
// a slot's heads stand side by side in memory, and so are read together.
#include "inferlab/attention.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <vector>

#include "attention_task.h"
#include "isa.h"
#include "parallel.h"

namespace inferlab::cpu {

INFERLAB_DECLARE_KERNEL(void, attention_block, const AttentionParams&, const AttentionTask&)
INFERLAB_DECLARE_KERNEL(void, attention_merge, const AttentionParams&, const AttentionTask&)

namespace {

constexpr int64_t kRowsPerBlock = 64;  // of one KV head
constexpr int64_t kRowsPerTask = 32;
// Where AMX takes the products, what of a slot is read at a time can be as long as streaming wants
// it.
constexpr int64_t kAmxRowsPerTask = 256;

// Grows and never shrinks, so that a decoding loop allocates nothing.
class Workspace {
 public:
  float* get(int64_t floats) {
    const auto need = static_cast<size_t>(floats) + 16;
    if (data_.size() < need) {
      try {
        data_.clear();
        data_.resize(need + need / 4);
      } catch (const std::bad_alloc&) {
        return nullptr;
      }
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(data_.data());
    return reinterpret_cast<float*>((address + 63) & ~uintptr_t{63});
  }

 private:
  std::vector<float> data_;
};

thread_local Workspace t_scratch;
thread_local Workspace t_partials;

struct Plan {
  const AttentionParams& p;
  int64_t nodes_per_block;
  int64_t blocks = 0, heads_per_task = 0, head_groups = 0, splits = 0;
  int64_t state_floats = 0, scratch_floats = 0;
  float* partials = nullptr;
  std::atomic<bool> out_of_memory{false};

  // Task index -> sequence, KV heads, block; later blocks, which see more, first.
  AttentionTask task(int64_t i) const {
    AttentionTask t{};
    const int64_t block = blocks - 1 - i % blocks;
    i /= blocks;
    t.head_begin = i % head_groups * heads_per_task;
    t.head_end = std::min(t.head_begin + heads_per_task, p.kv_heads);
    t.b = i / head_groups;
    t.node_begin = block * nodes_per_block;
    t.node_end = std::min(t.node_begin + nodes_per_block, p.nodes);
    t.split_begin = 0;
    t.split_end = splits;
    return t;
  }

  void run(AttentionTask t, void (*kernel)(const AttentionParams&, const AttentionTask&)) {
    t.scratch = t_scratch.get(scratch_floats);
    if (t.scratch == nullptr) {
      out_of_memory.store(true, std::memory_order_relaxed);
      return;
    }
    kernel(p, t);
  }
};

void block_kernel(const AttentionParams& p, const AttentionTask& t) {
  INFERLAB_DISPATCH(attention_block, p, t);
}
void merge_kernel(const AttentionParams& p, const AttentionTask& t) {
  INFERLAB_DISPATCH(attention_merge, p, t);
}

}  // namespace

Status paged_tree_attention(const AttentionParams& p) {
  if (p.batch == 0 || p.nodes == 0) return Status::kOk;
  const int64_t group = p.q_heads / p.kv_heads;
  int64_t positions = 0, longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t end = p.seq_lens[b] + p.node_offset + p.nodes;
    const int64_t seen = p.window > 0 ? std::min(end, p.window + p.nodes) : end;
    positions += seen;
    longest = std::max(longest, end);
  }
  Plan plan{p, std::clamp<int64_t>(kRowsPerBlock / group, 1, p.nodes)};
  const int64_t rows = plan.nodes_per_block * group;
  plan.blocks = (p.nodes + plan.nodes_per_block - 1) / plan.nodes_per_block;
  plan.splits = (longest + kSplit - 1) / kSplit;
  const bool amx =
      active_isa() == Isa::kAmx && p.dtype == DType::kBF16 && p.head_dim % kAmxChannels == 0;
  plan.heads_per_task =
      std::clamp<int64_t>((amx ? kAmxRowsPerTask : kRowsPerTask) / rows, 1, p.kv_heads);
  const int64_t units = p.batch * plan.blocks * plan.splits;
  const int64_t wanted = (2 * num_threads() + units - 1) / units;  // head groups, for balance
  if (wanted > 1) {
    plan.heads_per_task =
        std::clamp<int64_t>((p.kv_heads + wanted - 1) / wanted, 1, plan.heads_per_task);
  }
  plan.head_groups = (p.kv_heads + plan.heads_per_task - 1) / plan.heads_per_task;
  plan.state_floats = attention_state_floats(plan.heads_per_task * rows, p.head_dim);
  plan.scratch_floats = attention_scratch_floats(plan.heads_per_task, plan.nodes_per_block, group,
                                                 p.head_dim, p.words);

  const int64_t tasks = p.batch * plan.head_groups * plan.blocks;
  const int64_t bytes = positions * p.kv_heads * p.head_dim * 2 * dtype_size(p.dtype);
  const int64_t products = positions * p.nodes * p.q_heads * p.head_dim * 2;
  // In parallel_for's measure, where less than 64 KB, here about 60 us, is not worth a second
  // thread.
  const int64_t work = (bytes + products) / 32;
  if (tasks >= 2 * num_threads() || plan.splits == 1 || num_threads() == 1) {
    parallel_for(tasks, work, [&plan](int64_t i) { plan.run(plan.task(i), block_kernel); });
  } else {
    float* partials = t_partials.get(tasks * plan.splits * plan.state_floats);
    if (partials == nullptr) return Status::kOutOfMemory;
    plan.partials = partials;
    parallel_for(tasks * plan.splits, work, [&plan](int64_t i) {
      AttentionTask t = plan.task(i / plan.splits);
      t.split_begin = i % plan.splits;
      t.split_end = t.split_begin + 1;
      t.partials = plan.partials + i / plan.splits * plan.splits * plan.state_floats;
      plan.run(t, block_kernel);
    });
    parallel_for(tasks, tasks * plan.splits * plan.state_floats * 4, [&plan](int64_t i) {
      AttentionTask t = plan.task(i);
      t.partials = plan.partials + i * plan.splits * plan.state_floats;
      plan.run(t, merge_kernel);
    });
  }
  return plan.out_of_memory.load() ? Status::kOutOfMemory : Status::kOk;
}

}  // namespace inferlab::cpu
