// Speculative sampling (Leviathan et al. 2023; Chen et al. 2023), on trees in rounds (SpecInfer,
// Miao et al. 2024):
//   accept child x        iff  u < p(x) / q(x)
//   after each rejection  p <- norm(max(p - q, 0));  without replacement q <- norm(q without x)
//   none accepted         draw from p
// p and q stand dense in the thread's workspace, unnormalised beside their sums. Bytes moved per
// node with children: both rows twice, 8 per token for the weights, and 16 per token and rejection.
#include <cfloat>

#include "walk.h"

namespace inferlab::cpu {
namespace {

// Below this a normalised residual is nothing but rounding.
constexpr double kEmpty = 1e-25;

struct Weights {
  std::vector<float>* values;  // [size]
  double total;

  double at(int64_t token, int64_t size) const {
    return token < size ? static_cast<double>((*values)[static_cast<size_t>(token)]) / total : 0.0;
  }
};

Weights fill_weights(std::vector<float>& out, const Row& row, const Softmax& softmax, Cut cut,
                     Workspace& ws, bool threaded) {
  if (static_cast<int64_t>(out.size()) < row.size) out.resize(static_cast<size_t>(row.size));
  const double total = ordered_sum(row.size, ws, threaded, [&](int64_t i, int64_t j) {
    return INFERLAB_DISPATCH(sum_weights, row, i, j, softmax, cut, out.data());
  });
  return Weights{&out, total};
}

class Rounds {
 public:
  Rounds(const RejectionParams& params, const Visit& visit, const Row& row, const Choice& choice,
         Workspace& ws)
      : params_(params), v_(visit), row_(row), choice_(choice), ws_(ws) {}

  Decision run() {
    float max;
    if (!scan_row(row_, &max, v_.threaded)) return {-1, -1};
    const Cut cut =
        choice_.filters(row_.size) ? find_cut(row_, max, choice_, ws_, v_.threaded) : kKeepAll;
    if (v_.first_child >= 0 && open_draft()) {
      p_ = fill_weights(ws_.p, row_, choice_.softmax(max), cut, ws_, v_.threaded);
      ws_.tried.clear();
      for (int64_t c = v_.first_child; c >= 0; c = v_.params.next_sibling[v_.base + c]) {
        const int32_t token = v_.params.tokens[v_.base + c];
        if (!params_.with_replacement) {
          if (std::find(ws_.tried.begin(), ws_.tried.end(), token) != ws_.tried.end()) continue;
          ws_.tried.push_back(token);
        }
        if (accepts(c, token)) return {c, token};
        reject(token);
      }
    }
    return {-1, recover(cut)};
  }

 private:
  bool has_draft() const { return params_.draft_logits.data != nullptr; }

  // False: the draft row cannot have been sampled from, its children are passed over.
  bool open_draft() {
    if (!has_draft()) return true;
    const std::vector<int32_t> no_path;
    const Row draft =
        open_row(params_.draft_logits, v_.sequence, v_.node, nullptr, no_path, ws_, 1);
    float max;
    if (!scan_row(draft, &max, v_.threaded)) return false;
    const Cut cut =
        choice_.filters(draft.size) ? find_cut(draft, max, choice_, ws_, v_.threaded) : kKeepAll;
    q_ = fill_weights(ws_.q, draft, choice_.softmax(max), cut, ws_, v_.threaded);
    return true;
  }

  bool accepts(int64_t child, int32_t token) const {
    const double p = p_.at(token, row_.size);
    const double q = has_draft() ? q_.at(token, row_.size) : 1.0;
    const float u = noise_uniform(
        noise_word(choice_.seed, v_.position, static_cast<uint32_t>(child), kPurposeAccept));
    return p > 0.0 && static_cast<double>(u) * q < p;
  }

  double sum_of(const float* x) {
    return ordered_sum(row_.size, ws_, v_.threaded, [&](int64_t i, int64_t j) {
      return INFERLAB_DISPATCH(sum_floats, x + i, j - i);
    });
  }

  void reject(int32_t token) {
    if (!has_draft()) {  // q is a point mass: p only loses the token
      if (token >= row_.size) return;
      float& weight = (*p_.values)[static_cast<size_t>(token)];
      const float before = weight;
      weight = 0.0f;
      const double total = sum_of(p_.values->data());
      if (total > kEmpty) {
        p_.total = total;
        rejected_ = rejected_ || before > 0.0f;
      } else {
        weight = before;
      }
      return;
    }
    std::vector<float>& next = p_.values == &ws_.p ? ws_.r : ws_.p;
    if (next.size() < p_.values->size()) next.resize(p_.values->size());
    const float* p = p_.values->data();
    const float* q = q_.values->data();
    const auto p_scale = static_cast<float>(1.0 / p_.total);
    const auto q_scale = static_cast<float>(1.0 / q_.total);
    const double total = ordered_sum(row_.size, ws_, v_.threaded, [&](int64_t i, int64_t j) {
      return INFERLAB_DISPATCH(sum_residual, p + i, q + i, p_scale, q_scale, j - i,
                               next.data() + i);
    });
    if (total > kEmpty) {  // else p <= q everywhere by rounding: p stays as it was
      p_ = Weights{&next, total};
      rejected_ = true;
    }
    if (!params_.with_replacement && token < row_.size) {
      (*q_.values)[static_cast<size_t>(token)] = 0.0f;
      const double rest = sum_of(q);
      if (rest > 0.0) q_.total = rest;
    }
  }

  // The token at the last node: from the target itself if nothing was rejected, else from p.
  int32_t recover(Cut cut) {
    float score;
    int32_t token = -1;
    Top top = one_best(&score, &token);
    Draw draw{Score::kGumbel, choice_.temperature, choice_.seed, v_.position, kPurposeRecovery, cut,
              nullptr};
    if (!rejected_) {
      draw_row(row_, draw, top, v_.threaded);
      return token;
    }
    const Row weights = open_weights(p_.values->data(), row_.size, ws_, 1);
    float max;
    scan_row(weights, &max, v_.threaded);
    draw.score = Score::kLogGumbel;
    draw.cut = Cut{FLT_MIN, std::numeric_limits<int32_t>::max()};  // noise_log takes normal floats
    draw_row(weights, draw, top, v_.threaded);
    return token;
  }

  const RejectionParams& params_;
  const Visit& v_;
  const Row& row_;
  const Choice& choice_;
  Workspace& ws_;
  Weights p_{nullptr, 0.0}, q_{nullptr, 0.0};
  bool rejected_ = false;
};

}  // namespace

Status verify_tree_rejection(const RejectionParams& params) {
  return walk_trees(params.walk, [&](const Visit& v, const Row& row, Workspace& ws) {
    const Choice choice(v.params.sampling, v.sequence);
    if (choice.greedy) return enter_if_chosen(v, row, choice, ws);
    return Rounds(params, v, row, choice, ws).run();
  });
}

}  // namespace inferlab::cpu
