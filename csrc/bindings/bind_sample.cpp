#include <algorithm>
#include <string>

#include "bind.h"
#include "inferlab/noise.h"
#include "sampling_args.h"

namespace inferlab {
namespace {

constexpr int64_t kMetalRowsInFlight = 64;  // rows that Metal copies at a time, where it must

int64_t workspace_bytes(const Place& place, int64_t rows, int64_t vocab, bool penalised,
                        bool keys) {
  if (place.kind == Place::kMetal) {
    return penalised ? 4 * std::min(rows, kMetalRowsInFlight) * vocab : 0;
  }
  return cuda_bytes(place,
                    [&] { return cuda::sample_workspace_bytes(rows, vocab, penalised, keys); });
}

// keys: there are several samples, or scores.
void sample_workspace_bytes(Call& c) {
  Dim B("B"), V("V");
  Lead rows("B or B, N", B, 1, 2);
  Element T;
  c.in("logits", T, {rows, V}).strided();
  const bool penalised = c.flag("penalised"), keys = c.flag("keys");
  if (!c.ready()) return;
  c.answer(workspace_bytes(c.place(), rows.numel(), V, penalised, keys));
}

void sample(Call& c) {
  Dim B("B"), V("V"), samples("num_samples");
  Lead rows("B or B, N", B, 1, 2);
  Element T;
  const Arg& logits = c.in("logits", T, {rows, V}).rows();
  const Arg& positions = c.in("positions", kI64, {rows});
  const SamplingArgs sampling(c, B);
  const int64_t purpose = c.integer("purpose"), num_samples = c.integer("num_samples");
  const int64_t allowed_vocab = c.integer("allowed_vocab");
  const Arg& out = c.out("tokens", kI32, {rows, samples});
  const Arg& scores = c.out("scores", kF32, {rows, samples}).optional();
  Arg& workspace = c.workspace();
  if (!c.ready()) return;
  SampleParams p{};
  const int64_t count = rows.numel();
  p.logits = logits_view(logits, allowed_vocab);
  p.sampling = sampling.params(V);
  require(purpose >= kPurposeToken && purpose <= kPurposeRecovery,
          [&] { return "purpose is " + std::to_string(purpose) + "; it must be in [0, 3]"; });
  require(num_samples >= 1 && num_samples <= 65536, [&] {
    return "num_samples is " + std::to_string(num_samples) + "; it must be in [1, 65536]";
  });
  require(samples == num_samples, [&] {
    return "tokens has shape " + out.shape_str() + "; its last dimension must be num_samples, " +
           std::to_string(num_samples);
  });
  p.positions = positions.ptr<const int64_t>();
  p.tokens = out.ptr<int32_t>();
  p.scores = scores.ptr<float>();
  p.batch = B;
  p.nodes = count / B;
  p.num_samples = static_cast<int>(num_samples);
  p.purpose = static_cast<uint32_t>(purpose);
  const bool copies = sampling.change_logits(), keys = num_samples > 1 || scores.given();
  if (!c.on_cpu()) c.reserve(workspace, workspace_bytes(c.place(), count, V, copies, keys));
  c.cpu([&] { return cpu::sample(p); });
  c.cuda(
      [&](void* stream) { return cuda::sample(p, workspace.data(), workspace.bytes(), stream); });
  const int64_t threads = V > kMetalThreads ? kMetalThreads : kMetalSimd;
  c.metal(p, {copies ? std::min(count, kMetalRowsInFlight) : count, 1, 1, threads},
          {{"ELEMENT", T}, {"GROUP", threads}});
}

}  // namespace

void bind_sample(py::module_& m) {
  m.attr("GREEDY_TEMPERATURE") = static_cast<double>(kGreedyTemperature);
  define_query(m, "sample_workspace_bytes", sample_workspace_bytes);
  define(m, "sample", sample);
}

}  // namespace inferlab
