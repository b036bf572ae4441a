// sample: which token a row of logits gives, after penalties and filters, under the Gumbel noise
// of noise.h. The meaning of every parameter is that of inferlab.kernels.SamplingTensors.
#pragma once

#include "inferlab/dtype.h"
#include "inferlab/status.h"

namespace inferlab {

// Below this temperature the token is the argmax.
INFERLAB_CONSTANT float kGreedyTemperature = 1e-5f;

// Rows of logits; offsets are 64-bit, since batch * nodes * vocab passes 2^32.
struct LogitsView {
  Ptr<const void> data;  // [batch, nodes, vocab], the last dimension contiguous
  DType dtype;           //
  int64_t batch_stride;  // in elements
  int64_t node_stride;   // in elements
  int64_t allowed;       // columns [allowed, vocab) are padding and never chosen

#if !defined(__METAL_VERSION__)
  const void* row(int64_t b, int64_t n) const {
    return static_cast<const char*>(data) +
           (b * batch_stride + n * node_stride) * static_cast<int64_t>(dtype_size(dtype));
  }
#endif
};

struct SamplingParams {
  Ptr<const float> temperature;         // [batch]
  Ptr<const int32_t> top_k;             // [batch]; 0: off
  Ptr<const float> top_p;               // [batch]; 1: off
  Ptr<const float> min_p;               // [batch]; 0: off
  Ptr<const int64_t> seed;              // [batch]
  Ptr<const float> repetition_penalty;  // [batch] or null
  Ptr<const float> presence_penalty;    // [batch] or null
  Ptr<const float> frequency_penalty;   // [batch] or null
  Ptr<const int32_t> context_tokens;    // [batch, context_size] or null
  Ptr<const int32_t> context_lens;      // [batch]
  Ptr<const int32_t> prompt_lens;       // [batch]
  Ptr<const int32_t> bias_tokens;       // [batch, bias_size] or null; -1 pads
  Ptr<const float> bias_values;         // [batch, bias_size]
  int64_t context_size;
  int64_t bias_size;
};

struct SampleParams {
  LogitsView logits;
  Ptr<const int64_t> positions;  // [batch, nodes]
  SamplingParams sampling;
  Ptr<int32_t> tokens;  // [batch, nodes, num_samples] out
  Ptr<float> scores;  // the same, or null: what each token was chosen by; -inf where there is none
  int64_t batch;
  int64_t nodes;
  int num_samples;
  uint32_t purpose;
};

#if !defined(__METAL_VERSION__)
namespace cpu {
Status sample(const SampleParams& params);
}  // namespace cpu

namespace cuda {
// Pointers on the device; launched on `stream`. What is out of range among tokens and lengths is
// skipped or clamped. The workspace may hold anything; `penalised`: there are penalties or a bias.
// `keys`: there are several samples, or scores.
int64_t sample_workspace_bytes(int64_t rows, int64_t vocab, bool penalised, bool keys);
Status sample(const SampleParams& params, void* workspace, int64_t workspace_bytes, void* stream);
}  // namespace cuda
#endif
}  // namespace inferlab
