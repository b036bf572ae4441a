// verify_tree_lossy: accepts the first child that is likely enough (conf_threshold), among the k
// most likely (topk_agree) or in the locally typical set (typical); where none is, the target's own
// choice ends the walk.
//
// One group of blocks per sequence, as in verify_match.cu. Bytes per node with children: the row
// once to scan it, twice more under filters, then for conf_threshold once (the sum of weights), for
// topk_agree twice (the k-th largest), for typical twice (sum and entropy) and once per child that
// is tried; and once for the draw at the last node. All but the first time it comes from the L2
// cache. One meeting per pass.
#include "row_weights.cuh"
#include "walk.cuh"

namespace inferlab::cuda {
namespace {

struct LossyKernel {
  LossyParams op;
  RowPlan plan;
  RowWorkspace work;
};

}  // namespace

// ---- the rule -----------------------------------------------------------------------------------

// Which children of a node a policy accepts. The row has been scanned and is valid.
template <typename T>
class Judge {
 public:
  __device__ Judge(Group& group, const LossyParams& params, const Row<T>& row, const Choice& choice,
                   const Extent& extent)
      : group_(group), params_(params), row_(row) {
    // At temperature 0: the untruncated softmax, since a one-hot p would leave nothing to judge.
    weights_ = Weights{extent.max, choice.greedy ? 1.0f : choice.inv_temperature, keep_all()};
    const bool agree = params.policy == LossyPolicy::kTopkAgree;
    // The cut of the filters, then that of the policy, by the same code.
#pragma unroll 1
    for (int side = 0; side < (agree ? 2 : 1); ++side) {
      Choice filter = choice;
      if (side == 1) {
        filter.top_k = params.threshold < row.size ? static_cast<uint32_t>(params.threshold) : 0u;
        filter.top_p = 1.0f;
        filter.min_p = 0.0f;
      }
      if (!filter.filters() || (side == 0 && choice.greedy)) continue;
      const Cut cut = find_cut(group, row, filter, extent);
      (side == 0 ? weights_.cut : agree_) = cut;
    }
    if (agree) return;
    const Weights w = weights_;
    total_ = sum_row(group, row, [&](uint32_t t, float l) { return w.of(l, t); }).value();
    if (params.policy == LossyPolicy::kTypical) {
      // -log p(x) - entropy = E[log weight] - log weight(x). The bound keeps 0 * -inf away.
      const Sum sum = sum_row(group, row, [&](uint32_t t, float l) {
        const float weight = w.of(l, t);
        return weight > 0.0f ? weight * fminf(-w.log_of(l), 200.0f) : 0.0f;
      });
      center_ = static_cast<float>(-sum.value() / total_);
    }
  }

  // By all threads of all blocks.
  __device__ bool accepts(uint32_t token) const {
    if (token >= row_.size) return false;
    const float l = row_.at(token);
    if (!weights_.cut.keeps(l, token)) return false;
    if (params_.policy == LossyPolicy::kTopkAgree) return agree_.keeps(l, token);
    const float z = weights_.log_of(l);
    if (params_.policy == LossyPolicy::kConfThreshold) {
      return static_cast<double>(weight_exp(z)) / total_ >= params_.threshold;
    }
    const float distance = fabsf(z - center_);
    const Sum nearer = sum_row(group_, row_, [&](uint32_t t, float other) {
      const float d = fabsf(weights_.log_of(other) - center_);
      const bool counts = d < distance || (d == distance && t < token);
      return counts ? weights_.of(other, t) : 0.0f;
    });
    return nearer.value() / total_ < params_.threshold;
  }

  __device__ __forceinline__ Cut kept() const { return weights_.cut; }

 private:
  Group& group_;
  const LossyParams& params_;
  const Row<T>& row_;
  Weights weights_;
  Cut agree_ = keep_all();
  double total_ = 1.0;
  float center_ = 0.0f;
};

template <typename T>
__device__ Decision decide(Group& group, const LossyParams& params, const Tree& tree,
                           const Choice& choice, const Row<T>& row, int32_t node,
                           uint32_t position) {
  const int32_t first = tree.first_child(node);
  const Draw draw(choice, position, kPurposeToken);
  if (first < 0 && (choice.greedy || !choice.filters())) {
    return {-1, choose_unfiltered(group, row, choice, draw)};
  }
  const Extent extent = scan(group, row);
  if (!extent.valid) return {-1, -1};
  const Judge<T> judge(group, params, row, choice, extent);
  for (int32_t c = first; c >= 0; c = tree.next_sibling(c)) {
    const int32_t token = tree.token(c);
    if (judge.accepts(static_cast<uint32_t>(token))) return {c, token};
  }
  return {-1, draw_kept(group, row, choice, draw, judge.kept())};
}

// ---- kernel -------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads) lossy_kernel(LossyKernel k) {
  WalkShared& shared = shared_memory<WalkShared>();
  const VerifyParams& p = k.op.walk;
  const uint32_t size = static_cast<uint32_t>(p.logits.allowed);
  Group group = join_group(shared.row, k.plan, k.work);
  Penalties penalties = own_penalties(group, k.plan, k.work, p.sampling, size);
  for (int64_t b = group_index(k.plan); b < p.batch; b += k.plan.groups) {
    shared.choice.read(p.sampling, b, size);
    const Choice& choice = shared.choice;
    const Tree tree(p, b, shared);
    penalties.begin(b);
    walk_tree(p, b, group.leads(), [&](int32_t node, uint32_t position) {
      const Row<T> row = open_row<T>(p.logits, b, node, penalties);
      const Decision decision = decide(group, k.op, tree, choice, row, node, position);
      if (decision.child >= 0 && penalties.change_logits()) {
        group.meet();  // the copy was read in other blocks' slices
        penalties.add_path(decision.token);
      }
      return decision;
    });
  }
}

// ---- launcher -----------------------------------------------------------------------------------

Status verify_tree_lossy(const LossyParams& p, void* workspace, int64_t workspace_bytes,
                         void* stream) {
  const RowNeeds needs{p.walk.logits.allowed, changes_logits(p.walk.sampling), 0, 0};
  return with_dtype(p.walk.logits.dtype, [&](auto element) {
    return launch_rows(lossy_kernel<decltype(element)>, sizeof(WalkShared), p.walk.batch, needs,
                       workspace, workspace_bytes, stream, LossyKernel{p, {}, {}});
  });
}

}  // namespace inferlab::cuda
