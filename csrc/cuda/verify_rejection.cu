// verify_tree_rejection: speculative sampling (Leviathan et al. 2023; Chen et al. 2023), on trees
// in rounds (SpecInfer, Miao et al. 2024):
//   accept child x        iff  u < p(x) / q(x)
//   after each rejection  p <- norm(max(p - q, 0));  without replacement q <- norm(q without x)
//   none accepted         draw from p
// p and q never stand in memory. What rejections did to them is a list of steps in shared memory,
// and a token's p and q are computed from its two logits and that list whenever they are needed.
//
// One group of blocks per sequence, as in verify_match.cu. Bytes per node with children: both rows
// twice (scan and sum; filters read them twice more), both once more per rejection, and once more
// for the draw at the last node. All but the first time they come from the L2 cache. One meeting
// per pass.
#include "row_weights.cuh"
#include "walk.cuh"

namespace inferlab::cuda {
namespace {

// Siblings that are tried at a node; those behind are passed over. That costs acceptance and not
// exactness: what is drawn at last is right after any number of tries.
constexpr int kTries = 128;

// Below this a normalised residual is nothing but rounding.
constexpr double kEmpty = 1e-25;

struct Step {
  float p_scale, q_scale;  // p <- max(p * p_scale - q * q_scale, 0); a point mass: p(token) alone
  uint32_t token;
};

// p or q before the steps, and its sum after them. In shared memory for the registers' sake.
struct Side {
  Weights weights;
  Sum sum;
  double total;  // the sum, as a float's divisor
};

struct RejectionShared {
  WalkShared walk;
  Side draft, target;
  bool rejected;  // p is no more what it was
  Step steps[kTries];
};

struct RejectionKernel {
  RejectionParams op;
  RowPlan plan;
  RowWorkspace work;
};

struct Pair {
  float p, q;
};

}  // namespace

// ---- the rule -----------------------------------------------------------------------------------

// Element types: T of the target; the draft's is T too, or float.
template <typename T>
class Rejection {
 public:
  __device__ Rejection(Group& group, RejectionShared& shared, const RejectionParams& params,
                       const Tree& tree, const Row<T>& row, int64_t b, int32_t node,
                       uint32_t position)
      : group_(group),
        shared_(shared),
        params_(params),
        tree_(tree),
        choice_(shared.walk.choice),
        row_(row),
        b_(b),
        node_(node),
        position_(position) {}

  __device__ Decision run() {
    const int32_t first = tree_.first_child(node_);
    if (choice_.greedy || (first < 0 && !choice_.filters())) {
      const Draw draw(choice_, position_, choice_.greedy ? kPurposeToken : kPurposeRecovery);
      const int32_t token = choose_unfiltered(group_, row_, choice_, draw);
      return choice_.greedy ? enter_if_chosen(tree_, node_, token) : Decision{-1, token};
    }
    bool judge = first >= 0;
    // The draft's row, then the target's, by the same code.
#pragma unroll 1
    for (int of_target = judge && has_draft() ? 0 : 1; of_target < 2; ++of_target) {
      // Copies, member by member: a choice of references would put both rows into local memory.
      Row<T> row = row_;
      if (!of_target) row = draft();
      if (open_side(row, of_target ? shared_.target : shared_.draft, judge)) continue;
      if (of_target) return {-1, -1};
      judge = false;  // nothing sensible was drawn from it: the target alone decides
    }
    if (judge) {
      for (int32_t c = first; c >= 0 && count_ < kTries; c = tree_.next_sibling(c)) {
        const uint32_t token = static_cast<uint32_t>(tree_.token(c));
        if (!with_replacement() && tried(token)) continue;
        const Pair at = pair_at(token);
        if (accepts(c, at)) return {c, static_cast<int32_t>(token)};
        reject(token, at);
      }
    }
    if (shared_.rejected) return {-1, draw_residual()};
    return {-1, draw_kept(group_, row_, choice_, recovery(), shared_.target.weights.cut)};
  }

 private:
  __device__ __forceinline__ bool has_draft() const { return params_.draft_logits.data != nullptr; }
  __device__ __forceinline__ bool with_replacement() const { return params_.with_replacement; }

  // Opened again and again: it is two multiplications, and registers are few.
  __device__ __forceinline__ Row<T> draft() const {
    const LogitsView& view = params_.draft_logits;
    const bool wide = view.dtype == DType::kF32;
    const char* data = static_cast<const char*>(view.data) +
                       (b_ * view.batch_stride + node_ * view.node_stride) *
                           static_cast<int64_t>(wide ? sizeof(float) : sizeof(T));
    return Row<T>{data, row_.size, wide};
  }

  __device__ __forceinline__ Draw recovery() const {
    return Draw(choice_, position_, kPurposeRecovery);
  }

  // False: nothing can be sampled from the row.
  __device__ bool open_side(const Row<T>& row, Side& side, bool with_sum) {
    const Extent extent = scan(group_, row);
    if (!extent.valid) return false;
    Weights weights{extent.max, choice_.inv_temperature, keep_all()};
    if (choice_.filters()) weights.cut = find_cut(group_, row, choice_, extent);
    Sum sum;
    if (with_sum) sum = sum_row(group_, row, [&](uint32_t t, float l) { return weights.of(l, t); });
    if (threadIdx.x == 0) {
      side = Side{weights, sum, sum.value()};
      shared_.rejected = false;
    }
    __syncthreads();
    return true;
  }

  // What p and q of a token are after the steps. A drafter may propose what is no column of the
  // row.
  __device__ __forceinline__ Pair pair_at(uint32_t token) const {
    if (token >= row_.size) return {0.0f, has_draft() ? 0.0f : 1.0f};
    Pair w{shared_.target.weights.of(row_.at(token), token), 1.0f};
    if (has_draft()) w.q = shared_.draft.weights.of(draft().at(token), token);
    for (int i = 0; i < count_; ++i) {
      const Step step = shared_.steps[i];
      if (has_draft()) {
        w.p = fmaxf(w.p * step.p_scale - w.q * step.q_scale, 0.0f);
        if (!with_replacement() && token == step.token) w.q = 0.0f;
      } else if (token == step.token) {
        w.p = w.p * step.p_scale;
      }
    }
    return w;
  }

  // f(first token, p and q of 4 tokens) over this block's slice. Four and not a whole vector, so
  // that all of it fits into registers.
  template <typename F>
  __device__ __forceinline__ void for_pairs(F f) const {
    const uint32_t end = group_.end(row_.size);
    for (uint32_t t = group_.begin(row_.size) + threadIdx.x * 4; t < end; t += 4 * kThreads) {
      Pair pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = {0.0f, 0.0f};
        if (t + i < end) pairs[i] = pair_at(t + i);
      }
      f(t, pairs);
    }
  }

  __device__ bool tried(uint32_t token) const {
    bool found = false;
    for (int i = 0; i < count_; ++i) found |= shared_.steps[i].token == token;
    return found;
  }

  __device__ bool accepts(int32_t child, Pair at) const {
    const double p = static_cast<double>(at.p) / shared_.target.total;
    const double q = has_draft() ? static_cast<double>(at.q) / shared_.draft.total : 1.0;
    const float u = noise_uniform(
        noise_word(choice_.seed, position_, static_cast<uint32_t>(child), kPurposeAccept));
    return p > 0.0 && static_cast<double>(u) * q < p;
  }

  __device__ void reject(uint32_t token, Pair at) {
    Step step{1.0f, 0.0f, token};  // p stays as it was
    double total;                  // of what p becomes
    if (!has_draft()) {            // q is a point mass: p only loses the token
      Sum rest = shared_.target.sum;
      rest -= sum_of(at.p);
      total = rest.value();
      if (total > kEmpty) step.p_scale = 0.0f;
    } else {
      const auto p_scale = static_cast<float>(1.0 / shared_.target.total);
      const auto q_scale = static_cast<float>(1.0 / shared_.draft.total);
      Sum mine;
      for_pairs([&](uint32_t, const Pair(&pairs)[4]) {
#pragma unroll
        for (const Pair& w : pairs) mine.add(fmaxf(w.p * p_scale - w.q * q_scale, 0.0f));
      });
      total = meet_sum(group_, mine).value();
      if (total > kEmpty) step = Step{p_scale, q_scale, token};
    }
    __syncthreads();  // all have read what is written now
    if (threadIdx.x == 0) {
      shared_.steps[count_] = step;
      // Where nothing is left, p <= q everywhere but for rounding.
      if (total > kEmpty && (has_draft() || at.p > 0.0f)) shared_.rejected = true;
      if (total > kEmpty) shared_.target.total = total;
      if (!has_draft()) {
        if (total > kEmpty) shared_.target.sum -= sum_of(at.p);
      } else if (!with_replacement()) {
        shared_.draft.sum -= sum_of(at.q);
        const double rest = shared_.draft.sum.value();
        if (rest > 0.0) shared_.draft.total = rest;
      }
    }
    __syncthreads();
    ++count_;
  }

  // noise_log takes normal floats.
  __device__ int32_t draw_residual() {
    Best best;
    for_pairs([&](uint32_t first, const Pair(&pairs)[4]) {
      const PhiloxBlock block = philox4x32_10(position_, first / 4, kPurposeRecovery, 0u,
                                              static_cast<uint32_t>(choice_.seed),
                                              static_cast<uint32_t>(choice_.seed >> 32));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float p = pairs[i].p;
        if (p >= 0x1p-126f) best.offer(noise_log(p) + noise_gumbel(block.w[i]), first + i);
      }
    });
    group_.tell_best(best.key(), false);
    return token_of(group_.meet().best);
  }

  Group& group_;
  RejectionShared& shared_;
  const RejectionParams& params_;
  const Tree& tree_;
  const Choice& choice_;
  const Row<T>& row_;
  const int64_t b_;
  const int32_t node_;
  const uint32_t position_;
  int count_ = 0;
};

// ---- kernel -------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) rejection_kernel(RejectionKernel k) {
  RejectionShared& shared = shared_memory<RejectionShared>();
  const VerifyParams& p = k.op.walk;
  const uint32_t size = static_cast<uint32_t>(p.logits.allowed);
  Group group = join_group(shared.walk.row, k.plan, k.work);
  Penalties penalties = own_penalties(group, k.plan, k.work, p.sampling, size);
  for (int64_t b = group_index(k.plan); b < p.batch; b += k.plan.groups) {
    shared.walk.choice.read(p.sampling, b, size);
    const Tree tree(p, b, shared.walk);
    penalties.begin(b);
    walk_tree(p, b, group.leads(), [&](int32_t node, uint32_t position) {
      const Row<T> row = open_row<T>(p.logits, b, node, penalties);
      Rejection<T> rule(group, shared, k.op, tree, row, b, node, position);
      const Decision decision = rule.run();
      if (decision.child >= 0 && penalties.change_logits()) {
        group.meet();  // the copy was read in other blocks' slices
        penalties.add_path(decision.token);
      }
      return decision;
    });
  }
}

// ---- launcher -----------------------------------------------------------------------------------

Status verify_tree_rejection(const RejectionParams& p, void* workspace, int64_t workspace_bytes,
                             void* stream) {
  const DType target = p.walk.logits.dtype, draft = p.draft_logits.dtype;
  if (p.draft_logits.data != nullptr && draft != target && draft != DType::kF32) {
    return Status::kBadArgument;
  }
  const RowNeeds needs{p.walk.logits.allowed, changes_logits(p.walk.sampling), 0, 0};
  return with_dtype(target, [&](auto element) {
    return launch_rows(rejection_kernel<decltype(element)>, sizeof(RejectionShared), p.walk.batch,
                       needs, workspace, workspace_bytes, stream, RejectionKernel{p, {}, {}});
  });
}

}  // namespace inferlab::cuda
