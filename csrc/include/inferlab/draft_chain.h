// Chains of a draft model, written level by level: a token of each is drawn, and the model reads
// it.
#pragma once

#include <cstdint>
#include <functional>

#include "inferlab/decoder.h"
#include "inferlab/sampling.h"
#include "inferlab/status.h"

namespace inferlab::cpu {

struct DraftChain {
  const Decoder* decoder = nullptr;
  DecoderPass pass;      // of R sequences: pages, angles by position, and the roots' seq_lens
  SampleParams sample;   // of the logits at the roots, [R, 1, vocab]
  const int32_t* roots;  // [R] their positions, which key the noise
  int64_t levels = 0;
  int32_t* tokens = nullptr;  // [R, 1 + levels]: the levels' are written behind the roots
  // Takes the scores [R][2] of each two best; whether another level is to be drafted. Null: always.
  std::function<bool(const float*)> goes_on;
};

// Levels that were drafted go to `drafted`.
Status draft_chain(const DraftChain& chain, int64_t* drafted);

}  // namespace inferlab::cpu
