// verify_tree_match: accepts a child where it is the target's own choice. One launch: penalties,
// filters, the draw over the vocabulary, the walk and its padding.
//
// One group of blocks per sequence (row_group.cuh): as many blocks as fit on the device together
// and have kLeastSlice tokens each; one where there are more sequences than that. Bytes: the rows
// that the walk visits, (A + 1) * V * s, read once without filters (one meeting per row), and with
// them three times (three meetings), of which two come from the L2 cache.
//
// Greedy sequences of a small batch read all N rows at once, N * V * s, instead: one meeting in
// all, where a walk has one per node. Items of kItem tokens go to warps.
#include "walk.cuh"

namespace inferlab::cuda {

// ---- kernel -------------------------------------------------------------------------------------

constexpr uint32_t kItem = 2048;            // tokens
constexpr int64_t kAtOnceBytes = 32 << 20;  // of the batch; about 8 us, or three rows after another
constexpr uint64_t kBadRow = ~uint64_t{0};

struct MatchKernel {
  VerifyParams op;
  bool at_once;  // greedy sequences read all rows at once
  RowPlan plan;
  RowWorkspace work;  // zeros: [batch, nodes] best keys
};

// best[n] becomes the largest key of row n, kBadRow if there is a NaN or +inf.
template <typename T>
__device__ void arg_max_all(const Group& group, const LogitsView& logits, int64_t b, int64_t nodes,
                            uint64_t* best) {
  const uint32_t size = static_cast<uint32_t>(logits.allowed);
  const uint32_t per_row = (size + kItem - 1) / kItem;
  const int64_t items = nodes * per_row;
  const int64_t stride = static_cast<int64_t>(group.size) * kWarps;
  for (int64_t item = group.rank * kWarps + warp_index(); item < items; item += stride) {
    const int64_t node = item / per_row;
    const uint32_t begin = static_cast<uint32_t>(item % per_row) * kItem;
    const uint32_t end = begin + kItem < size ? begin + kItem : size;
    const Row<T> row = open_row<T>(logits, b, node);
    Best own;
    bool bad = false;
    for_vectors<32, 4>(row, begin, end, lane_index(),
                       [&](uint32_t first, const float (&x)[Row<T>::kPer]) {
#pragma unroll
                         for (int i = 0; i < Row<T>::kPer; ++i) bad |= !(x[i] < infinity());
                         own.offer_logits(x, first);
                       });
    const uint64_t key = warp_max(bad ? kBadRow : own.key());
    if (lane_index() == 0) atomic_max(&best[node], key);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) match_kernel(MatchKernel k) {
  WalkShared& shared = shared_memory<WalkShared>();
  const VerifyParams& p = k.op;
  const uint32_t size = static_cast<uint32_t>(p.logits.allowed);
  Group group = join_group(shared.row, k.plan, k.work);
  Penalties penalties = own_penalties(group, k.plan, k.work, p.sampling, size);
  const Choice& choice = shared.choice;
  for (int64_t b = group_index(k.plan); b < p.batch; b += k.plan.groups) {
    shared.choice.read(p.sampling, b, size);
    const Tree tree(p, b, shared);
    penalties.begin(b);
    if (k.at_once && group.size > 1 && choice.greedy && !penalties.change_logits()) {
      uint64_t* best = k.work.zeros + b * p.nodes;
      arg_max_all<T>(group, p.logits, b, p.nodes, best);
      group.meet();
      if (!group.leads()) continue;
      const int32_t near = p.nodes < kListed ? static_cast<int32_t>(p.nodes) : kListed;
      for (int32_t n = static_cast<int32_t>(threadIdx.x); n < near; n += kThreads) {
        shared.row.list[n] = __ldcg(&best[n]);
      }
      __syncthreads();
      walk_tree(p, b, true, [&](int32_t node, uint32_t) {
        const uint64_t key = node < near ? shared.row.list[node] : __ldcg(&best[node]);
        return enter_if_chosen(tree, node, key == kBadRow ? -1 : token_of(key));
      });
      continue;
    }
    walk_tree(p, b, group.leads(), [&](int32_t node, uint32_t position) {
      const Row<T> row = open_row<T>(p.logits, b, node, penalties);
      const int32_t token = choose(group, row, choice, position, kPurposeToken);
      const Decision decision = enter_if_chosen(tree, node, token);
      if (decision.child >= 0) penalties.add_path(token);
      return decision;
    });
  }
}

// ---- launcher -----------------------------------------------------------------------------------

// For any of the verifiers; the others have no use for the keys.
int64_t verify_workspace_bytes(int64_t batch, int64_t nodes, int64_t vocab, bool penalised) {
  return row_workspace_bytes(batch, RowNeeds{vocab, penalised, batch * nodes, 0});
}

Status verify_tree_match(const VerifyParams& p, void* workspace, int64_t workspace_bytes,
                         void* stream) {
  const int64_t all_bytes = p.batch * p.nodes * p.logits.allowed * dtype_size(p.logits.dtype);
  const RowNeeds needs{p.logits.allowed, changes_logits(p.sampling), p.batch * p.nodes, 0};
  const MatchKernel kernel{p, all_bytes <= kAtOnceBytes, {}, {}};
  return with_dtype(p.logits.dtype, [&](auto element) {
    return launch_rows(match_kernel<decltype(element)>, sizeof(WalkShared), p.batch, needs,
                       workspace, workspace_bytes, stream, kernel);
  });
}

}  // namespace inferlab::cuda
