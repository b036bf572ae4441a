#include "inferlab/sampling.h"

#include <limits>
#include <vector>

#include "row.h"

namespace inferlab::cpu {

Status sample(const SampleParams& params) {
  const int64_t rows = params.batch * params.nodes;
  const int64_t bytes = rows * params.logits.allowed * dtype_size(params.logits.dtype);
  return for_sequences(rows, bytes, [&](int64_t i, bool threaded) {
    Workspace& ws = Workspace::of_thread();
    const int64_t b = i / params.nodes;
    const Choice choice(params.sampling, b);
    ws.path.clear();
    const Row row = open_row(params.logits, b, i % params.nodes, &params.sampling, ws.path, ws);
    const int n = params.num_samples;
    int32_t* out = params.tokens + i * n;
    std::vector<float> many(n > 16 && params.scores == nullptr ? static_cast<size_t>(n) : 0);
    float few[16];
    float* scores = params.scores != nullptr ? params.scores + i * n : n > 16 ? many.data() : few;
    Top top{scores, out, n, 0};
    const auto position = static_cast<uint32_t>(params.positions[i]);
    if (!choose(row, choice, position, params.purpose, top, ws, threaded)) top.count = 0;
    for (int j = top.count; j < n; ++j) {
      out[j] = -1;
      scores[j] = -std::numeric_limits<float>::infinity();
    }
  });
}

Status gumbel_row(const GumbelRowParams& p) {
  INFERLAB_DISPATCH(gumbel_fill, p.seed, p.position, p.purpose, p.out, p.tokens);
  return Status::kOk;
}

}  // namespace inferlab::cpu
