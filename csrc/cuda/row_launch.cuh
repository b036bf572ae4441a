// How many blocks share a row, and what they need of the workspace.
#pragma once

#include <algorithm>

#include "row_penalties.cuh"

namespace inferlab::cuda {

constexpr int kBlocksPerSm = 1;        // 512 threads with 128 registers each
constexpr int64_t kLeastSlice = 1024;  // tokens that are worth a block

// Rows are given to `groups` groups of `size` blocks in turn. If size > 1, each group has one row.
struct RowPlan {
  uint32_t groups, size;
};

// In the workspace; null where the plan does not need it.
struct RowWorkspace {
  GroupBoards* boards;  // [groups]
  uint64_t* zeros;      // what a kernel asks for besides, zero like the boards
  GroupLists* lists;    // [groups]
  uint32_t* counts;     // [groups, stride]
  float* copies;        // [groups, stride]
  uint64_t* keys;       // what a kernel asks for besides
  int64_t stride;       // the vocabulary, rounded up to 8
  int64_t zero_bytes;   // from the start
  int64_t bytes;
};

struct RowNeeds {
  int64_t vocab;
  bool penalised;
  int64_t zeros, keys;  // words
};

inline bool changes_logits(const SamplingParams& s) {
  return s.repetition_penalty != nullptr || s.presence_penalty != nullptr ||
         s.frequency_penalty != nullptr || s.bias_size > 0;
}

inline RowPlan plan_rows(int64_t rows, int64_t resident_blocks, const RowNeeds& needs) {
  int64_t size = 1;
  if (2 * rows <= resident_blocks) {
    size = std::min(resident_blocks / rows, (needs.vocab + kLeastSlice - 1) / kLeastSlice);
  }
  // Alone, blocks are as many as there are rows, unless each needs room for a row.
  const int64_t groups = size == 1 && needs.penalised ? std::min(rows, resident_blocks) : rows;
  return RowPlan{static_cast<uint32_t>(groups), static_cast<uint32_t>(size)};
}

inline RowWorkspace lay_out(void* base, const RowPlan& plan, const RowNeeds& needs) {
  RowWorkspace w{};
  char* begin = static_cast<char*>(base);
  const auto take = [&](auto*& p, int64_t count) {
    if (count == 0) return;
    p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(begin + w.bytes);
    w.bytes += (count * static_cast<int64_t>(sizeof(*p)) + 255) / 256 * 256;
  };
  const int64_t sharing = plan.size > 1 ? plan.groups : 0;
  w.stride = (needs.vocab + 7) / 8 * 8;
  take(w.boards, sharing);
  if (sharing > 0) take(w.zeros, needs.zeros);
  w.zero_bytes = w.bytes;
  take(w.lists, sharing);
  if (sharing > 0) take(w.keys, needs.keys);
  if (needs.penalised) {
    take(w.counts, plan.groups * w.stride);
    take(w.copies, plan.groups * w.stride);
  }
  return w;
}

// Enough for any kernel over so many rows on the current device.
inline int64_t row_workspace_bytes(int64_t rows, const RowNeeds& needs) {
  const int64_t most = static_cast<int64_t>(kBlocksPerSm) * multiprocessors();
  return lay_out(nullptr, plan_rows(rows, most, needs), needs).bytes;
}

// P has the members plan and work, which are filled in here.
template <typename P>
Status launch_rows(void (*kernel)(P), size_t shared_bytes, int64_t rows, const RowNeeds& needs,
                   void* workspace, int64_t workspace_bytes, void* stream, P params) {
  int fitting = 0;
  const cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fitting, kernel, kThreads, shared_bytes);
  if (error != cudaSuccess) return to_status(error);
  const int64_t resident =
      static_cast<int64_t>(std::max(1, std::min(fitting, kBlocksPerSm))) * multiprocessors();
  params.plan = plan_rows(rows, resident, needs);
  params.work = lay_out(workspace, params.plan, needs);
  if (params.work.bytes > workspace_bytes) return Status::kBadArgument;
  if (params.work.zero_bytes > 0) {
    const cudaError_t cleared =
        cudaMemsetAsync(workspace, 0, static_cast<size_t>(params.work.zero_bytes),
                        static_cast<cudaStream_t>(stream));
    if (cleared != cudaSuccess) return to_status(cleared);
  }
  const dim3 grid(params.plan.groups * params.plan.size);
  return launch(kernel, grid, dim3(kThreads), shared_bytes, stream, params,
                params.plan.size > 1 ? Blocks::kTogether : Blocks::kIndependent);
}

// ---- in the kernel ------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t group_index(const RowPlan& plan) {
  return blockIdx.x / plan.size;
}
__device__ __forceinline__ Group join_group(RowShared& shared, const RowPlan& plan,
                                            const RowWorkspace& work) {
  return Group(shared, blockIdx.x % plan.size, plan.size, work.boards + group_index(plan),
               work.lists + group_index(plan));
}
__device__ __forceinline__ Penalties own_penalties(const Group& group, const RowPlan& plan,
                                                   const RowWorkspace& work,
                                                   const SamplingParams& sampling, uint32_t size) {
  const int64_t at = group_index(plan) * work.stride;
  return Penalties(group, sampling, size, work.counts + at, work.copies + at);
}

}  // namespace inferlab::cuda
