#include <cmath>
#include <string>

#include "bind.h"
#include "inferlab/noise.h"
#include "inferlab/sampling.h"
#include "inferlab/verify.h"
#include "tensor.h"

namespace py = pybind11;

namespace inferlab {
namespace {

// The 13 fields of SamplingTensors, in order, checked against the batch and the vocabulary. Values
// are checked on the CPU only; kernels on a device skip what is out of range.
class SamplingArgs {
 public:
  static constexpr size_t kFields = 13;

  SamplingArgs(py::tuple fields, const Place& place, int64_t batch, int64_t vocab)
      : fields_(checked(std::move(fields))),
        place_(place),
        temperature_(fields_[0], "temperature"),
        top_k_(fields_[1], "top_k"),
        top_p_(fields_[2], "top_p"),
        min_p_(fields_[3], "min_p"),
        seed_(fields_[4], "seed"),
        repetition_(fields_[5], "repetition_penalty"),
        presence_(fields_[6], "presence_penalty"),
        frequency_(fields_[7], "frequency_penalty"),
        context_(fields_[8], "context_tokens"),
        context_lens_(fields_[9], "context_lens"),
        prompt_lens_(fields_[10], "prompt_lens"),
        bias_tokens_(fields_[11], "bias_tokens"),
        bias_values_(fields_[12], "bias_values") {
    params_.temperature = column(temperature_, batch);
    params_.top_p = column(top_p_, batch);
    params_.min_p = column(min_p_, batch);
    top_k_.i32().shape({batch}).contiguous().on(place);
    params_.top_k = top_k_.ptr<const int32_t>();
    seed_.i64().shape({batch}).contiguous().on(place);
    params_.seed = seed_.ptr<const int64_t>();
    if (repetition_) params_.repetition_penalty = column(*repetition_, batch);
    if (presence_) params_.presence_penalty = column(*presence_, batch);
    if (frequency_) params_.frequency_penalty = column(*frequency_, batch);
    if (repetition_ || presence_ || frequency_) take_context(batch);
    if (bias_tokens_) take_bias(batch);
    if (!place.cuda) check_values(batch, vocab);
  }

  const SamplingParams& params() const { return params_; }
  bool change_logits() const {
    return repetition_ || presence_ || frequency_ || params_.bias_size > 0;
  }

 private:
  static py::tuple checked(py::tuple fields) {
    require(fields.size() == kFields, "sampling has " + std::to_string(fields.size()) +
                                          " fields; it must be SamplingTensors.flat, with 13");
    return fields;
  }

  template <typename V>
  [[noreturn]] static void fail(const char* name, int64_t b, V value, const char* allowed) {
    throw py::value_error(std::string(name) + "[" + std::to_string(b) + "] is " +
                          std::to_string(value) + "; it must be " + allowed);
  }

  const float* column(const Tensor& t, int64_t batch) const {
    t.f32().shape({batch}).contiguous().on(place_);
    return t.ptr<const float>();
  }

  void take_context(int64_t batch) {
    require(context_ && context_lens_ && prompt_lens_,
            "context_tokens, context_lens and prompt_lens must be given: a penalty is on");
    context_->dims(2).i32().shape({batch, Tensor::kAny}).contiguous().on(place_);
    context_lens_->i32().shape({batch}).contiguous().on(place_);
    prompt_lens_->i32().shape({batch}).contiguous().on(place_);
    params_.context_tokens = context_.ptr<const int32_t>();
    params_.context_lens = context_lens_.ptr<const int32_t>();
    params_.prompt_lens = prompt_lens_.ptr<const int32_t>();
    params_.context_size = context_->size(1);
  }

  void take_bias(int64_t batch) {
    require(static_cast<bool>(bias_values_), "bias_values is None; bias_tokens needs it");
    bias_tokens_->dims(2).i32().shape({batch, Tensor::kAny}).contiguous().on(place_);
    params_.bias_size = bias_tokens_->size(1);
    bias_values_->f32().shape({batch, params_.bias_size}).contiguous().on(place_);
    params_.bias_tokens = bias_tokens_.ptr<const int32_t>();
    params_.bias_values = bias_values_.ptr<const float>();
  }

  void check_values(int64_t batch, int64_t vocab) const {
    for (int64_t b = 0; b < batch; ++b) {
      const float t = params_.temperature[b], p = params_.top_p[b], m = params_.min_p[b];
      if (!(t >= 0.0f && t <= 3.4e38f)) fail("temperature", b, t, "finite and >= 0");
      if (!(p > 0.0f && p <= 1.0f)) fail("top_p", b, p, "in (0, 1]");
      if (!(m >= 0.0f && m <= 1.0f)) fail("min_p", b, m, "in [0, 1]");
      if (params_.top_k[b] < 0) fail("top_k", b, params_.top_k[b], ">= 0 (0: off)");
      if (repetition_) {
        const float r = params_.repetition_penalty[b];
        if (!(r > 0.0f && r <= 3.4e38f)) fail("repetition_penalty", b, r, "finite and > 0");
      }
      for (const OptionalTensor* penalty : {&presence_, &frequency_}) {
        if (!*penalty) continue;
        const float value = penalty->ptr<const float>()[b];
        if (!std::isfinite(value)) fail((*penalty)->name(), b, value, "finite");
      }
      if (params_.context_tokens != nullptr) check_context(b, vocab);
    }
    for (int64_t i = 0; i < batch * params_.bias_size; ++i) {
      const int32_t t = params_.bias_tokens[i];
      require(t >= -1 && t < vocab, [&] {
        return "bias_tokens holds " + std::to_string(t) + "; it must be in [0, " +
               std::to_string(vocab) + "), or -1 for padding";
      });
    }
  }

  void check_context(int64_t b, int64_t vocab) const {
    const int64_t length = params_.context_lens[b];
    if (length < 0 || length > params_.context_size) {
      fail("context_lens", b, length, "in [0, context_tokens.shape[1]]");
    }
    if (params_.prompt_lens[b] < 0 || params_.prompt_lens[b] > length) {
      fail("prompt_lens", b, params_.prompt_lens[b], "in [0, context_lens]");
    }
    const int32_t* tokens = params_.context_tokens + b * params_.context_size;
    for (int64_t i = 0; i < length; ++i) {
      require(tokens[i] >= 0 && tokens[i] < vocab, [&] {
        return "context_tokens[" + std::to_string(b) + ", " + std::to_string(i) + "] is " +
               std::to_string(tokens[i]) + "; it must be in [0, " + std::to_string(vocab) + ")";
      });
    }
  }

  py::tuple fields_;
  Place place_;
  Tensor temperature_, top_k_, top_p_, min_p_, seed_;
  OptionalTensor repetition_, presence_, frequency_, context_, context_lens_, prompt_lens_,
      bias_tokens_, bias_values_;
  SamplingParams params_{};
};

// Logits [batch, nodes, vocab]; two dimensions are taken as nodes = 1.
LogitsView logits_view(const Tensor& t, const Place& place, int64_t allowed_vocab,
                       bool batched_nodes) {
  const int last = t.ndim() - 1;
  t.last_dim_contiguous().on(place);
  LogitsView view{};
  view.dtype = t.float_dtype();
  view.data = t.data();
  view.batch_stride = t.stride(0);
  view.node_stride = batched_nodes ? t.stride(1) : 0;
  const int64_t vocab = t.size(last);
  require(vocab >= 1 && vocab < (int64_t{1} << 31) && t.size(0) >= 1 &&
              (!batched_nodes || t.size(1) >= 1),
          [&] {
            return std::string(t.name()) + " has shape " + t.shape_str() +
                   "; no dimension may be 0, and the vocabulary must be below 2^31";
          });
  require(allowed_vocab == -1 || allowed_vocab >= 1, [&] {
    return "allowed_vocab is " + std::to_string(allowed_vocab) + "; it must be >= 1";
  });
  view.allowed = allowed_vocab < 0 || allowed_vocab > vocab ? vocab : allowed_vocab;
  return view;
}

// What the three verifiers have in common.
struct WalkArgs {
  Tensor logits, tokens, first_child, next_sibling, seq_lens, nodes_out, tokens_out, count_out;
  Place place;
  SamplingArgs sampling;
  VerifyParams params;

  WalkArgs(py::handle logits_, py::handle tokens_, py::handle first_child_,
           py::handle next_sibling_, py::handle seq_lens_, py::tuple sampling_,
           int64_t allowed_vocab, py::handle nodes_out_, py::handle tokens_out_,
           py::handle count_out_)
      : logits(logits_, "logits"),
        tokens(tokens_, "tokens"),
        first_child(first_child_, "links.first_child"),
        next_sibling(next_sibling_, "links.next_sibling"),
        seq_lens(seq_lens_, "seq_lens"),
        nodes_out(nodes_out_, "accepted_nodes"),
        tokens_out(tokens_out_, "accepted_tokens"),
        count_out(count_out_, "num_accepted"),
        place(logits.place()),
        sampling(std::move(sampling_), place, logits.dims(3).size(0), logits.size(2)) {
    const int64_t batch = logits.size(0), nodes = logits.size(1), vocab = logits.size(2);
    params = VerifyParams{};
    params.logits = logits_view(logits, place, allowed_vocab, true);
    for (const Tensor* t : {&tokens, &first_child, &next_sibling, &nodes_out, &tokens_out}) {
      t->i32().shape({batch, nodes}).contiguous().on(place);
    }
    for (const Tensor* t : {&seq_lens, &count_out}) {
      t->i32().shape({batch}).contiguous().on(place);
    }
    params.tokens = tokens.ptr<const int32_t>();
    params.first_child = first_child.ptr<const int32_t>();
    params.next_sibling = next_sibling.ptr<const int32_t>();
    params.seq_lens = seq_lens.ptr<const int32_t>();
    params.sampling = sampling.params();
    params.accepted_nodes = nodes_out.ptr<int32_t>();
    params.accepted_tokens = tokens_out.ptr<int32_t>();
    params.num_accepted = count_out.ptr<int32_t>();
    params.batch = batch;
    params.nodes = nodes;
    if (!place.cuda) check_tree(vocab);
  }

 private:
  // Every node that a walk can reach has a token of the vocabulary, and links go up in index.
  void check_tree(int64_t vocab) const {
    for (int64_t b = 0; b < params.batch; ++b) {
      require(params.seq_lens[b] >= 0, [&] {
        return "seq_lens[" + std::to_string(b) + "] is " + std::to_string(params.seq_lens[b]) +
               "; it must be >= 0";
      });
      check_token(b, 0, vocab);
      for (int64_t n = 0; n < params.nodes; ++n) {
        const int64_t i = b * params.nodes + n;
        check_link(params.first_child[i], "links.first_child", b, n, vocab);
        check_link(params.next_sibling[i], "links.next_sibling", b, n, vocab);
      }
    }
  }

  void check_link(int64_t link, const char* name, int64_t b, int64_t n, int64_t vocab) const {
    if (link < 0) return;
    if (link <= n || link >= params.nodes) {
      throw py::value_error(std::string(name) + "[" + std::to_string(b) + ", " + std::to_string(n) +
                            "] is " + std::to_string(link) + "; it must be -1 or in (" +
                            std::to_string(n) + ", " + std::to_string(params.nodes) +
                            "): use build_tree");
    }
    check_token(b, link, vocab);
  }

  void check_token(int64_t b, int64_t n, int64_t vocab) const {
    const int64_t token = params.tokens[b * params.nodes + n];
    if (token < 0 || token >= vocab) {
      throw py::value_error("tokens[" + std::to_string(b) + ", " + std::to_string(n) + "] is " +
                            std::to_string(token) + "; it must be in [0, " + std::to_string(vocab) +
                            ")");
    }
  }
};

// Device memory for a kernel's intermediate results.
class WorkspaceArg {
 public:
  explicit WorkspaceArg(py::handle object) : tensor_(object, "workspace") {}

  void* data() const { return tensor_ ? tensor_->data() : nullptr; }
  int64_t bytes() const { return tensor_ ? tensor_->bytes() : 0; }

  const WorkspaceArg& holds(int64_t needed, const Place& place) const {
    if (tensor_) tensor_->contiguous().on(place);
    require(bytes() >= needed, [&] {
      return "workspace has " + std::to_string(bytes()) + " bytes; it must have at least " +
             std::to_string(needed);
    });
    require(reinterpret_cast<uintptr_t>(data()) % 16 == 0,
            "workspace must begin at a multiple of 16 bytes");
    return *this;
  }

 private:
  OptionalTensor tensor_;
};

// size() on the device of `place`; 0 on the CPU, where threads keep workspaces of their own.
template <typename Size>
int64_t workspace_bytes(const Place& place, Size size) {
#if defined(INFERLAB_WITH_CUDA)
  if (place.cuda) {
    const cuda::DeviceGuard guard(place.device);
    return size();
  }
#endif
  (void)place;
  (void)size;
  return 0;
}

int64_t sample_workspace_bytes(py::handle logits, bool penalised, bool keys) {
  const Tensor l(logits, "logits");
  require(l.ndim() == 2 || l.ndim() == 3,
          [&] { return "logits has shape " + l.shape_str() + "; it must be [B, V] or [B, N, V]"; });
  const int64_t rows = l.size(0) * (l.ndim() == 3 ? l.size(1) : 1), vocab = l.size(l.ndim() - 1);
  return workspace_bytes(
      l.place(), [&] { return cuda::sample_workspace_bytes(rows, vocab, penalised, keys); });
}

int64_t verify_workspace_bytes(py::handle logits, bool penalised) {
  const Tensor l(logits, "logits");
  l.dims(3);
  return workspace_bytes(l.place(), [&] {
    return cuda::verify_workspace_bytes(l.size(0), l.size(1), l.size(2), penalised);
  });
}

void sample(py::handle logits, py::handle positions, py::tuple sampling, int64_t purpose,
            int64_t num_samples, int64_t allowed_vocab, py::handle out, py::handle scores,
            py::handle workspace) {
  Tensor l(logits, "logits"), at(positions, "positions"), o(out, "tokens");
  require(l.ndim() == 2 || l.ndim() == 3,
          [&] { return "logits has shape " + l.shape_str() + "; it must be [B, V] or [B, N, V]"; });
  const Place place = l.place();
  const bool tree = l.ndim() == 3;
  const int64_t batch = l.size(0), nodes = tree ? l.size(1) : 1;
  const SamplingArgs args(std::move(sampling), place, batch, l.size(l.ndim() - 1));
  SampleParams params{};
  params.logits = logits_view(l, place, allowed_vocab, tree);
  require(purpose >= 0 && purpose <= 3,
          [&] { return "purpose is " + std::to_string(purpose) + "; it must be in [0, 3]"; });
  require(num_samples >= 1 && num_samples <= 65536, [&] {
    return "num_samples is " + std::to_string(num_samples) + "; it must be in [1, 65536]";
  });
  at.i64().contiguous().on(place);
  o.i32().contiguous().on(place);
  if (tree) {
    at.shape({batch, nodes});
    o.shape({batch, nodes, num_samples});
  } else {
    at.shape({batch});
    o.shape({batch, num_samples});
  }
  if (!scores.is_none()) {
    Tensor s(scores, "scores");
    s.f32().contiguous().on(place);
    if (tree) {
      s.shape({batch, nodes, num_samples});
    } else {
      s.shape({batch, num_samples});
    }
    params.scores = s.ptr<float>();
  }
  params.positions = at.ptr<const int64_t>();
  params.sampling = args.params();
  params.tokens = o.ptr<int32_t>();
  params.batch = batch;
  params.nodes = nodes;
  params.num_samples = static_cast<int>(num_samples);
  params.purpose = static_cast<uint32_t>(purpose);
  if (!place.cuda) {
    run_cpu("sample", [&] { return cpu::sample(params); });
    return;
  }
  const WorkspaceArg scratch(workspace);
  const bool keys = num_samples > 1 || params.scores != nullptr;
  scratch.holds(sample_workspace_bytes(logits, args.change_logits(), keys), place);
  run_cuda(logits, place, "sample", [&](void* stream) {
    return cuda::sample(params, scratch.data(), scratch.bytes(), stream);
  });
}

void verify_tree_match(py::handle logits, py::handle tokens, py::handle first_child,
                       py::handle next_sibling, py::handle seq_lens, py::tuple sampling,
                       int64_t allowed_vocab, py::handle nodes_out, py::handle tokens_out,
                       py::handle count_out, py::handle workspace) {
  const WalkArgs args(logits, tokens, first_child, next_sibling, seq_lens, std::move(sampling),
                      allowed_vocab, nodes_out, tokens_out, count_out);
  if (!args.place.cuda) {
    run_cpu("verify_tree_match", [&] { return cpu::verify_tree_match(args.params); });
    return;
  }
  const WorkspaceArg scratch(workspace);
  scratch.holds(verify_workspace_bytes(logits, args.sampling.change_logits()), args.place);
  run_cuda(logits, args.place, "verify_tree_match", [&](void* stream) {
    return cuda::verify_tree_match(args.params, scratch.data(), scratch.bytes(), stream);
  });
}

void verify_tree_rejection(py::handle logits, py::handle draft_logits, py::handle tokens,
                           py::handle first_child, py::handle next_sibling, py::handle seq_lens,
                           py::tuple sampling, bool with_replacement, int64_t allowed_vocab,
                           py::handle nodes_out, py::handle tokens_out, py::handle count_out,
                           py::handle workspace) {
  const WalkArgs args(logits, tokens, first_child, next_sibling, seq_lens, std::move(sampling),
                      allowed_vocab, nodes_out, tokens_out, count_out);
  const OptionalTensor draft(draft_logits, "draft_logits");
  RejectionParams params{args.params, LogitsView{}, with_replacement};
  if (draft) {
    draft->shape({args.params.batch, args.params.nodes, args.logits.size(2)});
    params.draft_logits = logits_view(*draft, args.place, allowed_vocab, true);
  }
  if (!args.place.cuda) {
    run_cpu("verify_tree_rejection", [&] { return cpu::verify_tree_rejection(params); });
    return;
  }
  if (draft && params.draft_logits.dtype != args.params.logits.dtype &&
      params.draft_logits.dtype != DType::kF32) {
    throw py::type_error("draft_logits has dtype " + draft->dtype_str() +
                         "; on CUDA it must be that of logits, " + args.logits.dtype_str() +
                         ", or float32");
  }
  const WorkspaceArg scratch(workspace);
  scratch.holds(verify_workspace_bytes(logits, args.sampling.change_logits()), args.place);
  run_cuda(logits, args.place, "verify_tree_rejection", [&](void* stream) {
    return cuda::verify_tree_rejection(params, scratch.data(), scratch.bytes(), stream);
  });
}

void verify_tree_lossy(py::handle logits, py::handle tokens, py::handle first_child,
                       py::handle next_sibling, py::handle seq_lens, py::tuple sampling, int policy,
                       double threshold, int64_t allowed_vocab, py::handle nodes_out,
                       py::handle tokens_out, py::handle count_out, py::handle workspace) {
  const WalkArgs args(logits, tokens, first_child, next_sibling, seq_lens, std::move(sampling),
                      allowed_vocab, nodes_out, tokens_out, count_out);
  require(policy >= 0 && policy <= 2,
          [&] { return "policy is " + std::to_string(policy) + "; it must be in [0, 2]"; });
  const LossyParams params{args.params, static_cast<LossyPolicy>(policy), threshold};
  if (!args.place.cuda) {
    run_cpu("verify_tree_lossy", [&] { return cpu::verify_tree_lossy(params); });
    return;
  }
  const WorkspaceArg scratch(workspace);
  scratch.holds(verify_workspace_bytes(logits, args.sampling.change_logits()), args.place);
  run_cuda(logits, args.place, "verify_tree_lossy", [&](void* stream) {
    return cuda::verify_tree_lossy(params, scratch.data(), scratch.bytes(), stream);
  });
}

}  // namespace

void bind_sampling(py::module_& m) {
  m.def("sample_workspace_bytes", &sample_workspace_bytes);
  m.def("verify_workspace_bytes", &verify_workspace_bytes);
  m.def("sample", &sample);
  m.def("verify_tree_match", &verify_tree_match);
  m.def("verify_tree_rejection", &verify_tree_rejection);
  m.def("verify_tree_lossy", &verify_tree_lossy);
}

}  // namespace inferlab
