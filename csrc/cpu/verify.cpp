// The walk down the tree, with the exact rule (match) and the three lossy ones. Rejection sampling
// is in rejection.cpp.
#include "inferlab/verify.h"

#include <cmath>

#include "walk.h"

namespace inferlab::cpu {

Decision enter_if_chosen(const Visit& v, const Row& row, const Choice& choice, Workspace& ws) {
  float score;
  int32_t token = -1;
  Top top = one_best(&score, &token);
  if (!choose(row, choice, v.position, kPurposeToken, top, ws, v.threaded)) return {-1, -1};
  for (int64_t c = v.first_child; c >= 0; c = v.params.next_sibling[v.base + c]) {
    if (v.params.tokens[v.base + c] == token) return {c, token};
  }
  return {-1, token};
}

Status verify_tree_match(const VerifyParams& params) {
  return walk_trees(params, [](const Visit& v, const Row& row, Workspace& ws) {
    return enter_if_chosen(v, row, Choice(v.params.sampling, v.sequence), ws);
  });
}

namespace {

// Which children of a node a lossy policy accepts.
class Judge {
 public:
  Judge(const LossyParams& params, const Row& row, float max, const Choice& choice, Workspace& ws,
        bool threaded)
      : params_(params), row_(row), ws_(ws), threaded_(threaded) {
    // At temperature 0: the untruncated softmax, since a one-hot p would leave nothing to judge.
    softmax_ = choice.greedy ? Softmax{max, 1.0f} : choice.softmax(max);
    kept_ = choice.greedy || !choice.filters(row.size) ? kKeepAll
                                                       : find_cut(row, max, choice, ws, threaded);
    if (params.policy == LossyPolicy::kTopkAgree) {
      agree_ = top_k_cut(row, max, params.top_k, ws);
      return;
    }
    total_ = sum([&](int64_t i, int64_t j) {
      return INFERLAB_DISPATCH(sum_weights, row_, i, j, softmax_, kept_, nullptr);
    });
    if (params.policy == LossyPolicy::kTypical) {
      // -log p(x) - entropy = E[log weight] - log weight(x)
      center_ = static_cast<float>(sum([&](int64_t i, int64_t j) {
                                     return INFERLAB_DISPATCH(sum_weighted_logs, row_, i, j,
                                                              softmax_, kept_);
                                   }) /
                                   total_);
    }
  }

  bool accepts(int64_t token) const {
    if (token >= row_.size) return false;
    const float l = row_at(row_, token);
    if (!kept_.keeps(l, token)) return false;
    if (params_.policy == LossyPolicy::kTopkAgree) return agree_.keeps(l, token);
    const float z = (l - softmax_.max) * softmax_.inv_temperature;
    if (params_.policy == LossyPolicy::kConfThreshold) {
      return static_cast<double>(INFERLAB_DISPATCH(exp_one, z)) / total_ >= params_.threshold;
    }
    const float distance = std::fabs(z - center_);
    const double mass_before = sum([&](int64_t i, int64_t j) {
      return INFERLAB_DISPATCH(sum_nearer, row_, i, j, softmax_, kept_, center_, distance, token);
    });
    return mass_before / total_ < params_.threshold;
  }

  const Cut& kept() const { return kept_; }

 private:
  template <typename Part>
  double sum(Part part) const {
    return ordered_sum(row_.size, ws_, threaded_, part);
  }

  const LossyParams& params_;
  const Row& row_;
  Workspace& ws_;
  bool threaded_;
  Softmax softmax_{};
  Cut kept_ = kKeepAll;
  Cut agree_ = kKeepAll;
  double total_ = 0.0;
  float center_ = 0.0f;
};

}  // namespace

Status verify_tree_lossy(const LossyParams& params) {
  return walk_trees(params.walk, [&](const Visit& v, const Row& row, Workspace& ws) -> Decision {
    const Choice choice(v.params.sampling, v.sequence);
    float score, max;
    int32_t token = -1;
    Top top = one_best(&score, &token);
    if (v.first_child < 0) {
      const bool valid = choose(row, choice, v.position, kPurposeToken, top, ws, v.threaded);
      return {-1, valid ? token : -1};
    }
    if (!scan_row(row, &max, v.threaded)) return {-1, -1};
    const Judge judge(params, row, max, choice, ws, v.threaded);
    for (int64_t c = v.first_child; c >= 0; c = v.params.next_sibling[v.base + c]) {
      const int32_t candidate = v.params.tokens[v.base + c];
      if (judge.accepts(candidate)) return {c, candidate};
    }
    const Draw draw{choice.greedy ? Score::kLogit : Score::kGumbel,
                    choice.temperature,
                    choice.seed,
                    v.position,
                    kPurposeToken,
                    judge.kept(),
                    nullptr};
    draw_row(row, draw, top, v.threaded);
    return {-1, token};
  });
}

}  // namespace inferlab::cpu
