#include "inferlab/bandwidth.h"

#include <atomic>

#include "isa.h"
#include "parallel.h"

namespace inferlab::cpu {

INFERLAB_DECLARE_KERNEL(float, sum_chunk, const float*, int64_t)

Status read_memory(ReadParams& params) {
  if (params.count % 64 != 0) return Status::kBadArgument;
  const int64_t chunk = 64 * 1024;
  const int64_t tasks = (params.count + chunk - 1) / chunk;
  std::atomic<float> total{0.0f};
  parallel_for(tasks, params.count * 4, [&](int64_t task) {
    const int64_t begin = task * chunk;
    const int64_t n = params.count - begin < chunk ? params.count - begin : chunk;
    const float part = INFERLAB_DISPATCH(sum_chunk, params.data + begin, n);
    float seen = total.load(std::memory_order_relaxed);
    while (!total.compare_exchange_weak(seen, seen + part, std::memory_order_relaxed)) {
    }
  });
  params.sum = total.load();
  return Status::kOk;
}

}  // namespace inferlab::cpu
