// sample: the token of each row, or the best few in order.
//
// One group of blocks per row (row_group.cuh), as many blocks as fit on the device together and
// have kLeastSlice tokens each; one where there are more rows than that. Bytes: V * s per row, read
// once without filters (one meeting), and with them three times (three meetings), of which two come
// from the L2 cache. Several samples, or scores: a scan and a pass more, and one meeting for 256 of
// them.
#include "row_launch.cuh"
#include "row_top.cuh"

namespace inferlab::cuda {

// ---- kernel -------------------------------------------------------------------------------------

struct SampleKernel {
  SampleParams op;
  RowPlan plan;
  RowWorkspace work;  // keys: [groups, size, kTop]
};

struct SampleShared {
  RowShared row;
  Choice choice;
};

template <typename T, bool kKeys>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) sample_kernel(SampleKernel k) {
  SampleShared& shared = shared_memory<SampleShared>();
  const SampleParams& p = k.op;
  const uint32_t size = static_cast<uint32_t>(p.logits.allowed);
  Group group = join_group(shared.row, k.plan, k.work);
  Penalties penalties = own_penalties(group, k.plan, k.work, p.sampling, size);
  for (int64_t r = group_index(k.plan); r < p.batch * p.nodes; r += k.plan.groups) {
    const int64_t b = r / p.nodes;
    shared.choice.read(p.sampling, b, size);
    penalties.begin(b);
    const Row<T> row = open_row<T>(p.logits, b, r % p.nodes, penalties);
    const uint32_t position = static_cast<uint32_t>(p.positions[r]);
    int32_t* out = p.tokens + r * p.num_samples;
    if constexpr (kKeys) {
      uint64_t* merged = k.work.keys + r * k.plan.size * kTop;  // one row per group, if it is used
      float* scores = p.scores == nullptr ? nullptr : p.scores + r * p.num_samples;
      choose_many(group, row, shared.choice, position, p.purpose, p.num_samples, merged, out,
                  scores);
    } else {
      const int32_t token = choose(group, row, shared.choice, position, p.purpose);
      if (group.leads() && threadIdx.x == 0) out[0] = token;
    }
  }
}

// ---- launcher -----------------------------------------------------------------------------------

namespace {

RowNeeds needs_of(int64_t vocab, bool penalised, bool keys) {
  const int64_t blocks = int64_t{kBlocksPerSm} * multiprocessors();
  return RowNeeds{vocab, penalised, 0, keys ? blocks * kTop : 0};
}

}  // namespace

int64_t sample_workspace_bytes(int64_t rows, int64_t vocab, bool penalised, bool keys) {
  return row_workspace_bytes(rows, needs_of(vocab, penalised, keys));
}

Status sample(const SampleParams& p, void* workspace, int64_t workspace_bytes, void* stream) {
  const SampleKernel kernel{p, {}, {}};
  const bool keys = p.num_samples > 1 || p.scores != nullptr;
  const RowNeeds needs = needs_of(p.logits.allowed, changes_logits(p.sampling), keys);
  return with_dtype(p.logits.dtype, [&](auto element) {
    using T = decltype(element);
    const auto by_keys = keys ? sample_kernel<T, true> : sample_kernel<T, false>;
    return launch_rows(by_keys, sizeof(SampleShared), p.batch * p.nodes, needs, workspace,
                       workspace_bytes, stream, kernel);
  });
}

}  // namespace inferlab::cuda
