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

struct LossyShared {
  WalkShared walk;
  Choice agreeing;  // the filter that keeps the k most likely
  // What is known of the row. Here for the registers' sake; written by one thread.
  Weights weights;
  Cut agree;
  double total;
  float center;
};

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
  __device__ Judge(Group& group, LossyShared& shared, const LossyParams& params, const Row<T>& row,
                   const Extent& extent)
      : group_(group), shared_(shared), params_(params), row_(row) {
    const Choice& choice = shared.walk.choice;
    if (threadIdx.x == 0) {
      // At temperature 0: the untruncated softmax, since a one-hot p would leave nothing to judge.
      const float inv_temperature = choice.greedy ? 1.0f : choice.inv_temperature;
      shared.weights = Weights{extent.max, inv_temperature, keep_all()};
      shared.agree = keep_all();
    }
    // The cut of the filters, then that of the policy, by the same code.
    const bool agree = params.policy == LossyPolicy::kTopkAgree;
#pragma unroll 1
    for (int of_policy = 0; of_policy < (agree ? 2 : 1); ++of_policy) {
      const Choice& filter = of_policy ? shared.agreeing : choice;
      if (!filter.filters()) continue;
      const Cut cut = find_cut(group, row, filter, extent);
      if (threadIdx.x == 0) (of_policy ? shared.agree : shared.weights.cut) = cut;
    }
    __syncthreads();
    if (agree) return;
    const Weights& w = shared.weights;
    const double total =
        sum_row(group, row, [&](uint32_t t, float l) { return w.of(l, t); }).value();
    if (threadIdx.x == 0) shared.total = total;
    if (params.policy == LossyPolicy::kTypical) {
      // -log p(x) - entropy = E[log weight] - log weight(x). The bound keeps 0 * -inf away.
      const Sum sum = sum_row(group, row, [&](uint32_t t, float l) {
        const float weight = w.of(l, t);
        return weight > 0.0f ? weight * fminf(-w.log_of(l), 200.0f) : 0.0f;
      });
      if (threadIdx.x == 0) shared.center = static_cast<float>(-sum.value() / total);
    }
    __syncthreads();
  }

  // By all threads of all blocks.
  __device__ bool accepts(uint32_t token) const {
    if (token >= row_.size) return false;
    const Weights& w = shared_.weights;
    const float l = row_.at(token);
    if (!w.cut.keeps(l, token)) return false;
    if (params_.policy == LossyPolicy::kTopkAgree) return shared_.agree.keeps(l, token);
    if (params_.policy == LossyPolicy::kConfThreshold) {
      return static_cast<double>(w.of(l, token)) / shared_.total >= params_.threshold;
    }
    const float distance = fabsf(w.log_of(l) - shared_.center);
    const Sum nearer = sum_row(group_, row_, [&](uint32_t t, float other) {
      const float d = fabsf(w.log_of(other) - shared_.center);
      const bool counts = d < distance || (d == distance && t < token);
      return counts ? w.of(other, t) : 0.0f;
    });
    return nearer.value() / shared_.total < params_.threshold;
  }

 private:
  Group& group_;
  LossyShared& shared_;
  const LossyParams& params_;
  const Row<T>& row_;
};

template <typename T>
__device__ Decision decide(Group& group, const LossyParams& params, const Tree& tree,
                           LossyShared& shared, const Row<T>& row, int32_t node,
                           uint32_t position) {
  const Choice& choice = shared.walk.choice;
  const int32_t first = tree.first_child(node);
  const Draw draw(choice, position, kPurposeToken);
  if (first < 0 && !choice.filters()) {
    return {-1, choose_unfiltered(group, row, choice, draw)};
  }
  const Extent extent = scan(group, row);
  if (!extent.valid) return {-1, -1};
  const Judge<T> judge(group, shared, params, row, extent);
  for (int32_t c = first; c >= 0; c = tree.next_sibling(c)) {
    const int32_t token = tree.token(c);
    if (judge.accepts(static_cast<uint32_t>(token))) return {c, token};
  }
  return {-1, draw_kept(group, row, choice, draw, shared.weights.cut)};
}

// ---- kernel -------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) lossy_kernel(LossyKernel k) {
  LossyShared& shared = shared_memory<LossyShared>();
  const VerifyParams& p = k.op.walk;
  const uint32_t size = static_cast<uint32_t>(p.logits.allowed);
  Group group = join_group(shared.walk.row, k.plan, k.work);
  Penalties penalties = own_penalties(group, k.plan, k.work, p.sampling, size);
  if (threadIdx.x == 0) {  // read behind the barriers of the first sequence
    const uint32_t kept = k.op.top_k < size ? static_cast<uint32_t>(k.op.top_k) : 0u;
    shared.agreeing = Choice{1.0f, 1.0f, kept, 1.0f, 0.0f, false, 0};
  }
  for (int64_t b = group_index(k.plan); b < p.batch; b += k.plan.groups) {
    shared.walk.choice.read(p.sampling, b, size);
    const Tree tree(p, b, shared.walk);
    penalties.begin(b);
    walk_tree(p, b, group.leads(), [&](int32_t node, uint32_t position) {
      const Row<T> row = open_row<T>(p.logits, b, node, penalties);
      const Decision decision = decide(group, k.op, tree, shared, row, node, position);
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
    return launch_rows(lossy_kernel<decltype(element)>, sizeof(LossyShared), p.walk.batch, needs,
                       workspace, workspace_bytes, stream, LossyKernel{p, {}, {}});
  });
}

}  // namespace inferlab::cuda
