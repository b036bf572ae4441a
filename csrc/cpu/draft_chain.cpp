#include "inferlab/draft_chain.h"

#include <algorithm>
#include <vector>

namespace inferlab::cpu {

Status draft_chain(const DraftChain& chain, int64_t* drafted) {
  const int64_t size = chain.pass.batch, width = 1 + chain.levels;
  const int num_samples = chain.goes_on ? 2 : 1;
  std::vector<int32_t> drawn(size * num_samples), seq_lens(size);
  std::vector<float> scores(size * num_samples);
  std::vector<int64_t> positions(size), places(size), inputs(size);
  std::vector<char> logits(size * chain.decoder->head.out * dtype_size(chain.decoder->dtype));
  SampleParams sample = chain.sample;
  sample.positions = positions.data();
  sample.tokens = drawn.data();
  sample.scores = chain.goes_on ? scores.data() : nullptr;
  sample.num_samples = num_samples;
  DecoderPass pass = chain.pass;
  pass.nodes = 1;
  pass.tokens = inputs.data();
  pass.positions = places.data();
  pass.seq_lens = seq_lens.data();
  pass.logits = logits.data();
  for (int64_t level = 1; level <= chain.levels; ++level) {
    for (int64_t b = 0; b < size; ++b) positions[b] = chain.roots[b] + level;
    Status status = cpu::sample(sample);
    if (status != Status::kOk) return status;
    for (int64_t b = 0; b < size; ++b) {
      // An invalid row drafts token 0; the target decides anyway.
      inputs[b] = std::max(drawn[b * num_samples], 0);
      chain.tokens[b * width + level] = static_cast<int32_t>(inputs[b]);
    }
    *drafted = level;
    if (chain.goes_on && !chain.goes_on(scores.data())) break;
    if (level == chain.levels) break;
    for (int64_t b = 0; b < size; ++b) {
      seq_lens[b] = chain.pass.seq_lens[b] + static_cast<int32_t>(level);
      places[b] = seq_lens[b];
    }
    status = forward(*chain.decoder, pass);
    if (status != Status::kOk) return status;
    sample.logits.data = logits.data();
    sample.logits.batch_stride = chain.decoder->head.out;
  }
  return Status::kOk;
}

}  // namespace inferlab::cpu
