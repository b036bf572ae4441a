// rms_norm: out = (weight + offset) * x / sqrt(mean(x^2) + eps), row by row (Zhang & Sennrich,
// 2019).
//
// One threadgroup per row. Bytes: rows * dim elements read (the second pass from cache) and
// written, weight once.
#include "element.h"
#include "group.h"
#include "inferlab/layer.h"

constant constexpr uint kThreads = kMetalThreads;

struct RmsNormShared {
  float parts[kThreads / kSimd];
};

[[max_total_threads_per_threadgroup(kThreads)]]
kernel void rms_norm(device const Element* x [[buffer(0)]],
                     device const Element* weight [[buffer(1)]], device Element* out [[buffer(2)]],
                     constant RmsNormParams& p [[buffer(3)]],
                     uint3 group [[threadgroup_position_in_grid]],
                     uint tid [[thread_index_in_threadgroup]]) {
  INFERLAB_SHARED(RmsNormShared, shared);
  device const Element* row = x + group.x * p.x_stride;
  float sum = 0.0f;
  for (long i = tid; i < p.dim; i += kThreads) sum = fma(to_float(row[i]), to_float(row[i]), sum);
  sum = group_reduce<Add, kThreads>(sum, shared.parts, tid);
  const float scale = 1.0f / precise::sqrt(sum / float(p.dim) + p.eps);
  device Element* to = out + group.x * p.out_stride;
  for (long i = tid; i < p.dim; i += kThreads) {
    const float normed = to_float(row[i]) * scale;
    to[i] = to_element((p.offset != 0.0f ? normed : rounded(normed)) *
                       (to_float(weight[i]) + p.offset));
  }
}
