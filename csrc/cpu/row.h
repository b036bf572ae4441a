// One row of logits on its way to a token: penalties, filters, the draw. Shared by `sample` and the
// verifiers, so that plain and speculative decoding choose by the same code.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <new>
#include <vector>

#include "inferlab/sampling.h"
#include "parallel.h"
#include "row_kernels.h"

namespace inferlab::cpu {

// Buffers of a thread, grown and kept. A row of logits is touched in the caller's memory, unless
// penalties or a bias change it.
struct Workspace {
  std::vector<float> penalised;     // the row after penalties
  std::vector<float> block_max[2];  // of the target's row; of a second one
  std::vector<float> order;         // scratch for selection
  std::vector<uint64_t> keys, masses, histograms;
  std::vector<double> chunk_sums;
  std::vector<float> p, q, r;  // rejection: target, draft, residual
  std::vector<int32_t> path;   // tokens from below the root to the node
  std::vector<int32_t> tried;
  std::vector<uint32_t> counts;  // [vocab], zero between uses
  std::vector<float> top_scores;
  std::vector<int32_t> top_tokens;

  static Workspace& of_thread();
};

// What one sequence asks for.
struct Choice {
  float temperature;
  int32_t top_k;
  float top_p;
  float min_p;
  uint64_t seed;
  bool greedy;

  Choice(const SamplingParams& s, int64_t b)
      : temperature(s.temperature[b]),
        top_k(s.top_k[b]),
        top_p(s.top_p[b]),
        min_p(s.min_p[b]),
        seed(static_cast<uint64_t>(s.seed[b])),
        greedy(s.temperature[b] < kGreedyTemperature) {}

  bool filters(int64_t size) const {
    return (top_k > 0 && top_k < size) || top_p < 1.0f || min_p > 0.0f;
  }
  Softmax softmax(float max) const { return Softmax{max, 1.0f / temperature}; }
};

// The row of node n with the penalties and bias of sequence b (null: none), not scanned yet. `slot`
// picks the block_max buffer.
Row open_row(const LogitsView& view, int64_t b, int64_t n, const SamplingParams* sampling,
             const std::vector<int32_t>& path, Workspace& ws, int slot = 0);
Row open_weights(float* weights, int64_t size, Workspace& ws, int slot);

float row_at(const Row& row, int64_t token);

// Fills block_max and finds the largest element. False: nothing can be sampled from this row.
bool scan_row(const Row& row, float* max, bool threaded);

// The last token that top-k, top-p and min-p keep. The row is scanned.
Cut find_cut(const Row& row, float max, const Choice& choice, Workspace& ws, bool threaded);
Cut top_k_cut(const Row& row, float max, int64_t k, Workspace& ws);

// Draws from a scanned row.
void draw_row(const Row& row, const Draw& draw, Top& top, bool threaded);

// Scan, filters, draw: the best tokens of a row into `top`. False as for scan_row.
bool choose(const Row& row, const Choice& choice, uint32_t position, uint32_t purpose, Top& top,
            Workspace& ws, bool threaded);

// Sum over chunks of part(begin, end), in a fixed order whoever computes them.
double ordered_sum(int64_t size, Workspace& ws, bool threaded,
                   const std::function<double(int64_t, int64_t)>& part);

inline Top one_best(float* score, int32_t* token) { return Top{score, token, 1, 0}; }

// Runs body(sequence, threaded) for every sequence: over the threads if there are enough of them,
// else one after the other, each with its rows spread over the threads.
template <typename Body>
Status for_sequences(int64_t count, int64_t bytes, Body body) {
  std::atomic<bool> out_of_memory{false};
  const bool threaded = count < num_threads();
  const auto guarded = [&](int64_t i) {
    try {
      body(i, threaded);
    } catch (const std::bad_alloc&) {
      out_of_memory.store(true);
    }
  };
  if (threaded) {
    for (int64_t i = 0; i < count; ++i) guarded(i);
  } else {
    parallel_for(count, bytes, guarded);
  }
  return out_of_memory.load() ? Status::kOutOfMemory : Status::kOk;
}

}  // namespace inferlab::cpu
