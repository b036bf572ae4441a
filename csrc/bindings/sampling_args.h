// What `sample` and the verifiers share: the 13 tensors of SamplingTensors and the rows of logits.
#pragma once

#include <cmath>
#include <string>

#include "inferlab/sampling.h"
#include "op.h"

namespace inferlab {

// Declares the fields of SamplingTensors in its order; params() once the call is ready. Values are
// checked on the CPU only; kernels on a device skip what is out of range.
class SamplingArgs {
 public:
  SamplingArgs(Call& c, Dim& B)
      : call_(c),
        temperature_(c.in("temperature", kF32, {B})),
        top_k_(c.in("top_k", kI32, {B})),
        top_p_(c.in("top_p", kF32, {B})),
        min_p_(c.in("min_p", kF32, {B})),
        seed_(c.in("seed", kI64, {B})),
        repetition_(c.in("repetition_penalty", kF32, {B}).optional()),
        presence_(c.in("presence_penalty", kF32, {B}).optional()),
        frequency_(c.in("frequency_penalty", kF32, {B}).optional()),
        context_(c.in("context_tokens", kI32, {B, context_size_}).optional()),
        context_lens_(c.in("context_lens", kI32, {B}).optional()),
        prompt_lens_(c.in("prompt_lens", kI32, {B}).optional()),
        bias_tokens_(c.in("bias_tokens", kI32, {B, bias_size_}).optional()),
        bias_values_(c.in("bias_values", kF32, {B, bias_size_}).optional()) {}

  SamplingParams params(int64_t vocab) const {
    SamplingParams p{};
    p.temperature = temperature_.ptr<const float>();
    p.top_k = top_k_.ptr<const int32_t>();
    p.top_p = top_p_.ptr<const float>();
    p.min_p = min_p_.ptr<const float>();
    p.seed = seed_.ptr<const int64_t>();
    p.repetition_penalty = repetition_.ptr<const float>();
    p.presence_penalty = presence_.ptr<const float>();
    p.frequency_penalty = frequency_.ptr<const float>();
    if (penalises()) {
      require(context_.given() && context_lens_.given() && prompt_lens_.given(),
              "context_tokens, context_lens and prompt_lens must be given: a penalty is on");
      p.context_tokens = context_.ptr<const int32_t>();
      p.context_lens = context_lens_.ptr<const int32_t>();
      p.prompt_lens = prompt_lens_.ptr<const int32_t>();
      p.context_size = context_size_;
    }
    if (bias_tokens_.given()) {
      require(bias_values_.given(), "bias_values is None; bias_tokens needs it");
      p.bias_tokens = bias_tokens_.ptr<const int32_t>();
      p.bias_values = bias_values_.ptr<const float>();
      p.bias_size = bias_size_;
    }
    if (call_.on_cpu()) check_values(p, vocab);
    return p;
  }

  // Whether there are penalties or a bias: a row is then copied before it is chosen from.
  bool change_logits() const {
    return penalises() || (bias_tokens_.given() && int64_t{bias_size_} > 0);
  }

 private:
  bool penalises() const { return repetition_.given() || presence_.given() || frequency_.given(); }

  template <typename V>
  [[noreturn]] static void fail(const char* name, int64_t b, V value, const char* allowed) {
    throw py::value_error(std::string(name) + "[" + std::to_string(b) + "] is " +
                          std::to_string(value) + "; it must be " + allowed);
  }

  void check_values(const SamplingParams& p, int64_t vocab) const {
    const int64_t batch = temperature_.size(0);
    for (int64_t b = 0; b < batch; ++b) {
      const float t = p.temperature[b], top = p.top_p[b], min = p.min_p[b];
      if (!(t >= 0.0f && t <= 3.4e38f)) fail("temperature", b, t, "finite and >= 0");
      if (!(top > 0.0f && top <= 1.0f)) fail("top_p", b, top, "in (0, 1]");
      if (!(min >= 0.0f && min <= 1.0f)) fail("min_p", b, min, "in [0, 1]");
      if (p.top_k[b] < 0) fail("top_k", b, p.top_k[b], ">= 0 (0: off)");
      if (p.repetition_penalty != nullptr) {
        const float r = p.repetition_penalty[b];
        if (!(r > 0.0f && r <= 3.4e38f)) fail("repetition_penalty", b, r, "finite and > 0");
      }
      for (const Arg* penalty : {&presence_, &frequency_}) {
        if (!penalty->given()) continue;
        const float value = penalty->ptr<const float>()[b];
        if (!std::isfinite(value)) fail(penalty->name(), b, value, "finite");
      }
      if (p.context_tokens != nullptr) check_context(p, b, vocab);
    }
    for (int64_t i = 0; i < batch * p.bias_size; ++i) {
      const int32_t t = p.bias_tokens[i];
      require(t >= -1 && t < vocab, [&] {
        return "bias_tokens holds " + std::to_string(t) + "; it must be in [0, " +
               std::to_string(vocab) + "), or -1 for padding";
      });
    }
  }

  static void check_context(const SamplingParams& p, int64_t b, int64_t vocab) {
    const int64_t length = p.context_lens[b];
    if (length < 0 || length > p.context_size) {
      fail("context_lens", b, length, "in [0, context_tokens.shape[1]]");
    }
    if (p.prompt_lens[b] < 0 || p.prompt_lens[b] > length) {
      fail("prompt_lens", b, p.prompt_lens[b], "in [0, context_lens]");
    }
    const int32_t* tokens = p.context_tokens + b * p.context_size;
    for (int64_t i = 0; i < length; ++i) {
      require(tokens[i] >= 0 && tokens[i] < vocab, [&] {
        return "context_tokens[" + std::to_string(b) + ", " + std::to_string(i) + "] is " +
               std::to_string(tokens[i]) + "; it must be in [0, " + std::to_string(vocab) + ")";
      });
    }
  }

  Call& call_;
  Dim context_size_{"context_size"}, bias_size_{"bias_size"};
  const Arg &temperature_, &top_k_, &top_p_, &min_p_, &seed_;
  const Arg &repetition_, &presence_, &frequency_, &context_, &context_lens_, &prompt_lens_;
  const Arg &bias_tokens_, &bias_values_;
};

// Logits [batch, nodes, vocab] or, as one node each, [batch, vocab].
inline LogitsView logits_view(const Tensor& t, int64_t allowed_vocab) {
  LogitsView view{};
  view.dtype = t.float_dtype();
  view.data = t.data();
  view.batch_stride = t.stride(0);
  view.node_stride = t.ndim() == 3 ? t.stride(1) : 0;
  const int64_t vocab = t.size(t.ndim() - 1);
  require(t.numel() > 0 && vocab < (int64_t{1} << 31), [&] {
    return std::string(t.name()) + " has shape " + t.shape_str() +
           "; no dimension may be 0, and the vocabulary must be below 2^31";
  });
  require(allowed_vocab == -1 || allowed_vocab >= 1, [&] {
    return "allowed_vocab is " + std::to_string(allowed_vocab) + "; it must be >= 1";
  });
  view.allowed = allowed_vocab < 0 || allowed_vocab > vocab ? vocab : allowed_vocab;
  return view;
}

// bytes() on the CUDA device of `place`; 0 elsewhere.
template <typename Bytes>
int64_t cuda_bytes(const Place& place, Bytes bytes) {
#if defined(INFERLAB_WITH_CUDA)
  if (place.kind == Place::kCuda) {
    const cuda::DeviceGuard guard(place.device);
    return bytes();
  }
#endif
  (void)place;
  (void)bytes;
  return 0;
}

}  // namespace inferlab
