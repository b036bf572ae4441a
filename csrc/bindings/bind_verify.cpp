#include <iterator>
#include <optional>
#include <string>

#include "bind.h"
#include "inferlab/verify.h"
#include "sampling_args.h"

namespace inferlab {
namespace {

constexpr const char* kPolicies[] = {"conf_threshold", "topk_agree", "typical"};  // LossyPolicy

int64_t workspace_bytes(const Place& place, int64_t batch, int64_t nodes, int64_t vocab,
                        bool penalised) {
  if (place.kind == Place::kMetal) return 4 * kMetalRejectionRows * batch * vocab;
  return cuda_bytes(place,
                    [&] { return cuda::verify_workspace_bytes(batch, nodes, vocab, penalised); });
}

// As many bytes as the verifier needs that needs most.
void verify_workspace_bytes(Call& c) {
  Dim B("B"), N("N"), V("V");
  Element T;
  c.in("logits", T, {B, N, V}).strided();
  const bool penalised = c.flag("penalised");
  if (!c.ready()) return;
  c.answer(workspace_bytes(c.place(), B, N, V, penalised));
}

// What the three verifiers have in common: the arguments in front, and those behind.
class Walk {
 public:
  explicit Walk(Call& c) : call_(c), logits_(c.in("logits", T, {B, N, V}).rows().decides()) {}

  void take_tree() {
    tokens_ = &call_.in("tokens", kI32, {B, N});
    first_child_ = &call_.in("links.first_child", kI32, {B, N});
    next_sibling_ = &call_.in("links.next_sibling", kI32, {B, N});
    seq_lens_ = &call_.in("seq_lens", kI32, {B});
    sampling_.emplace(call_, B);
  }
  void take_outputs() {
    allowed_vocab = call_.integer("allowed_vocab");
    accepted_nodes_ = &call_.out("accepted_nodes", kI32, {B, N});
    accepted_tokens_ = &call_.out("accepted_tokens", kI32, {B, N});
    num_accepted_ = &call_.out("num_accepted", kI32, {B});
    workspace_ = &call_.workspace();
  }

  // Once the call is ready, and logits what they are going to be.
  VerifyParams params() const {
    VerifyParams p{};
    p.logits = logits_view(logits_, allowed_vocab);
    p.tokens = tokens_->ptr<const int32_t>();
    p.first_child = first_child_->ptr<const int32_t>();
    p.next_sibling = next_sibling_->ptr<const int32_t>();
    p.seq_lens = seq_lens_->ptr<const int32_t>();
    p.sampling = sampling_->params(V);
    p.accepted_nodes = accepted_nodes_->ptr<int32_t>();
    p.accepted_tokens = accepted_tokens_->ptr<int32_t>();
    p.num_accepted = num_accepted_->ptr<int32_t>();
    p.batch = B;
    p.nodes = N;
    if (call_.on_cpu()) check_tree(p);
    return p;
  }

  // Runs a verifier: cpu(), cuda(workspace, bytes, stream) or, with `params` and `rows` rows of
  // logits in the workspace of each sequence, Metal's.
  template <typename Params, typename Cpu, typename Cuda>
  void run(const Params& params, int64_t rows, Cpu cpu, Cuda cuda) {
    const bool copies = sampling_->change_logits();
    if (call_.on_cuda()) {
      call_.reserve(*workspace_, workspace_bytes(call_.place(), B, N, V, copies));
    } else if (call_.on_metal()) {
      call_.reserve(*workspace_, rows > 1 || copies ? 4 * rows * B * V : 0);
    }
    call_.cpu(cpu);
    call_.cuda([&](void* s) { return cuda(workspace_->data(), workspace_->bytes(), s); });
    const int64_t threads = V > kMetalThreads ? kMetalThreads : kMetalSimd;
    const Macro element("ELEMENT", logits_.float_dtype());
    call_.metal(params, {B, 1, 1, threads}, {element, {"GROUP", threads}});
  }

  Dim B{"B"}, N{"N"}, V{"V"};
  Element T;
  int64_t allowed_vocab = 0;
  Arg& logits() { return logits_; }

 private:
  // Every node that a walk can reach has a token of the vocabulary, and links go up in index.
  void check_tree(const VerifyParams& p) const {
    for (int64_t b = 0; b < p.batch; ++b) {
      require(p.seq_lens[b] >= 0, [&] {
        return "seq_lens[" + std::to_string(b) + "] is " + std::to_string(p.seq_lens[b]) +
               "; it must be >= 0";
      });
      check_token(p, b, 0);
      for (int64_t n = 0; n < p.nodes; ++n) {
        const int64_t i = b * p.nodes + n;
        check_link(p, p.first_child[i], "links.first_child", b, n);
        check_link(p, p.next_sibling[i], "links.next_sibling", b, n);
      }
    }
  }

  void check_link(const VerifyParams& p, int64_t link, const char* name, int64_t b,
                  int64_t n) const {
    if (link < 0) return;
    if (link <= n || link >= p.nodes) {
      throw py::value_error(std::string(name) + "[" + std::to_string(b) + ", " + std::to_string(n) +
                            "] is " + std::to_string(link) + "; it must be -1 or in (" +
                            std::to_string(n) + ", " + std::to_string(p.nodes) +
                            "): use build_tree");
    }
    check_token(p, b, link);
  }

  void check_token(const VerifyParams& p, int64_t b, int64_t n) const {
    const int64_t token = p.tokens[b * p.nodes + n];
    if (token < 0 || token >= V) {
      throw py::value_error("tokens[" + std::to_string(b) + ", " + std::to_string(n) + "] is " +
                            std::to_string(token) + "; it must be in [0, " + std::to_string(V) +
                            ")");
    }
  }

  Call& call_;
  Arg& logits_;
  const Arg *tokens_, *first_child_, *next_sibling_, *seq_lens_;
  std::optional<SamplingArgs> sampling_;
  const Arg *accepted_nodes_, *accepted_tokens_, *num_accepted_;
  Arg* workspace_;
};

void verify_tree_match(Call& c) {
  Walk walk(c);
  walk.take_tree();
  walk.take_outputs();
  if (!c.ready()) return;
  const VerifyParams p = walk.params();
  walk.run(
      p, 1, [&] { return cpu::verify_tree_match(p); },
      [&](void* w, int64_t n, void* s) { return cuda::verify_tree_match(p, w, n, s); });
}

void verify_tree_rejection(Call& c) {
  Walk walk(c);
  Element draft_type;
  Arg& draft = c.in("draft_logits", draft_type, {walk.B, walk.N, walk.V}).rows().optional();
  walk.take_tree();
  const bool with_replacement = c.flag("with_replacement");
  walk.take_outputs();
  if (!c.ready()) return;
  const bool mixed = draft.given() && DType{draft_type} != DType{walk.T};
  if (c.on_cuda() && mixed && DType{draft_type} != DType::kF32) {
    throw py::type_error("draft_logits has dtype " + draft.dtype_str() +
                         "; on CUDA it must be that of logits, " + walk.logits().dtype_str() +
                         ", or float32");
  }
  if (c.on_metal() && mixed) {  // one element type: float32 holds them all
    c.widen(walk.logits());
    c.widen(draft);
  }
  RejectionParams p{walk.params(), LogitsView{}, with_replacement};
  if (draft.given()) p.draft_logits = logits_view(draft, walk.allowed_vocab);
  walk.run(
      p, kMetalRejectionRows, [&] { return cpu::verify_tree_rejection(p); },
      [&](void* w, int64_t n, void* s) { return cuda::verify_tree_rejection(p, w, n, s); });
}

void verify_tree_lossy(Call& c) {
  Walk walk(c);
  walk.take_tree();
  const int64_t policy = c.integer("policy");
  const double threshold = c.number("threshold");
  walk.take_outputs();
  if (!c.ready()) return;
  constexpr int64_t last = std::size(kPolicies) - 1;
  require(policy >= 0 && policy <= last, [&] {
    return "policy is " + std::to_string(policy) + "; it must be in [0, " + std::to_string(last) +
           "]";
  });
  LossyParams p{walk.params(), static_cast<LossyPolicy>(policy), 0.0f, 0.0, 0};
  const bool by_rank = p.policy == LossyPolicy::kTopkAgree;
  require(
      by_rank ? threshold >= 1.0 && threshold < 2147483648.0 : threshold >= 0.0 && threshold <= 1.0,
      [&] {
        const std::string value = py::str(py::float_(threshold)).cast<std::string>();
        return "threshold is " + value + "; it must be " +
               (by_rank ? "k, in [1, 2^31)," : "in [0, 1]") + " for " + kPolicies[policy];
      });
  if (by_rank) {
    p.top_k = static_cast<int64_t>(threshold);
  } else {
    p.threshold = threshold;
    p.threshold_f32 = static_cast<float>(threshold);
  }
  walk.run(
      p, 1, [&] { return cpu::verify_tree_lossy(p); },
      [&](void* w, int64_t n, void* s) { return cuda::verify_tree_lossy(p, w, n, s); });
}

}  // namespace

void bind_verify(py::module_& m) {
  py::tuple policies(std::size(kPolicies));
  for (size_t i = 0; i < policies.size(); ++i) policies[i] = kPolicies[i];
  m.attr("LOSSY_POLICIES") = policies;
  define_query(m, "verify_workspace_bytes", verify_workspace_bytes);
  define(m, "verify_tree_match", verify_tree_match);
  define(m, "verify_tree_rejection", verify_tree_rejection);
  define(m, "verify_tree_lossy", verify_tree_lossy);
}

}  // namespace inferlab
