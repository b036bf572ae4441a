// Splits the outputs over threads; rows of x that are not fp32 are widened, or laid out for AMX,
// once, up front.
// Bytes: out * in * s (the weight, once), rows * (in + out) * s.
#include "inferlab/linear.h"

#include <vector>

#include "isa.h"
#include "parallel.h"

namespace inferlab::cpu {

INFERLAB_DECLARE_KERNEL(int64_t, linear_scratch_floats, const LinearParams&)
INFERLAB_DECLARE_KERNEL(void, linear_prepare, const LinearParams&, float*)
INFERLAB_DECLARE_KERNEL(void, linear_outputs, const LinearParams&, const float*, int64_t, int64_t)

Status linear(const LinearParams& p) {
  constexpr int64_t kAlign = 64 / sizeof(float);
  thread_local std::vector<float> memory;
  const int64_t floats = INFERLAB_DISPATCH(linear_scratch_floats, p) + kAlign;
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(static_cast<size_t>(floats));
  const uintptr_t misplaced = reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % kAlign;
  float* scratch = memory.data() + (kAlign - misplaced) % kAlign;
  INFERLAB_DISPATCH(linear_prepare, p, scratch);
  // A few tasks per thread, so that a thread that is interrupted holds up little.
  const int64_t bytes = p.out * p.in * dtype_size(p.dtype) * (p.rows + 3) / 4;
  const int64_t pieces = bytes < (1 << 20) ? num_threads() : 4 * num_threads();
  const int64_t chunk = ((p.out + pieces - 1) / pieces + 15) / 16 * 16;
  const int64_t tasks = (p.out + chunk - 1) / chunk;
  parallel_for(tasks, bytes, [&](int64_t task) {
    const int64_t begin = task * chunk;
    const int64_t end = begin + chunk < p.out ? begin + chunk : p.out;
    INFERLAB_DISPATCH(linear_outputs, p, scratch, begin, end);
  });
  return Status::kOk;
}

}  // namespace inferlab::cpu
