// Splits the outputs over threads; rows of x that are not fp32 are widened once, up front.
// Bytes: out * in * s (the weight, once), rows * (in + out) * s.
#include "inferlab/linear.h"

#include <vector>

#include "isa.h"
#include "parallel.h"

namespace inferlab::cpu {

INFERLAB_DECLARE_KERNEL(void, linear_widen, const LinearParams&, float*)
INFERLAB_DECLARE_KERNEL(void, linear_outputs, const LinearParams&, const float*, int64_t, int64_t,
                        int64_t)

Status linear(const LinearParams& p) {
  const float* x = static_cast<const float*>(p.x);
  int64_t x_stride = p.x_stride;
  if (p.dtype != DType::kF32) {
    thread_local std::vector<float> wide;
    if (static_cast<int64_t>(wide.size()) < p.rows * p.in) {
      wide.resize(static_cast<size_t>(p.rows * p.in));
    }
    INFERLAB_DISPATCH(linear_widen, p, wide.data());
    x = wide.data();
    x_stride = p.in;
  }
  // A few tasks per thread, so that a thread that is interrupted holds up little.
  const int64_t bytes = p.out * p.in * dtype_size(p.dtype) * (p.rows + 3) / 4;
  const int64_t pieces = bytes < (1 << 20) ? num_threads() : 4 * num_threads();
  const int64_t chunk = ((p.out + pieces - 1) / pieces + 15) / 16 * 16;
  const int64_t tasks = (p.out + chunk - 1) / chunk;
  parallel_for(tasks, bytes, [&](int64_t task) {
    const int64_t begin = task * chunk;
    const int64_t end = begin + chunk < p.out ? begin + chunk : p.out;
    INFERLAB_DISPATCH(linear_outputs, p, x, x_stride, begin, end);
  });
  return Status::kOk;
}

}  // namespace inferlab::cpu
