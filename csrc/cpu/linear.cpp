// Splits the outputs over threads; rows of x that are not fp32 are widened, or laid out for AMX,
// once, up front, but where bf16 is multiplied as it is.
// Bytes: out * in * s (the weight, once), rows * (in + out) * s.
#include "inferlab/linear.h"

#include "arena.h"
#include "isa.h"
#include "linear_tasks.h"
#include "parallel.h"

namespace inferlab::cpu {

INFERLAB_DECLARE_KERNEL(int64_t, linear_scratch_floats, const LinearParams&)
INFERLAB_DECLARE_KERNEL(void, linear_prepare, const LinearParams&, float*)
INFERLAB_DECLARE_KERNEL(void, linear_outputs, const LinearParams&, const float*, int64_t, int64_t)

LinearTasks::LinearTasks(const LinearParams& params) : p_(params) {
  scratch_floats_ = INFERLAB_DISPATCH(linear_scratch_floats, p_);
  const int64_t bits = p_.bits > 0 ? p_.bits : 8 * dtype_size(p_.dtype);
  bytes_ = p_.out * p_.in * bits / 8 * (p_.rows + 3) / 4;
  // A few tasks per thread, so that a thread that is interrupted holds up little.
  const int64_t pieces = bytes_ < (1 << 20) ? num_threads() : 4 * num_threads();
  chunk_ = ((p_.out + pieces - 1) / pieces + 15) / 16 * 16;
  count_ = p_.rows == 0 ? 0 : (p_.out + chunk_ - 1) / chunk_;
}

void LinearTasks::prepare(float* scratch) const { INFERLAB_DISPATCH(linear_prepare, p_, scratch); }

void LinearTasks::run(int64_t task, const float* scratch) const {
  const int64_t begin = task * chunk_;
  const int64_t end = begin + chunk_ < p_.out ? begin + chunk_ : p_.out;
  INFERLAB_DISPATCH(linear_outputs, p_, scratch, begin, end);
}

Status linear(const LinearParams& params) {
  thread_local Arena memory;
  const LinearTasks tasks(params);
  float* scratch = memory.get(tasks.scratch_floats());
  if (scratch == nullptr) return Status::kOutOfMemory;
  tasks.prepare(scratch);
  parallel_for(tasks.count(), tasks.bytes(), [&](int64_t task) { tasks.run(task, scratch); });
  return Status::kOk;
}

}  // namespace inferlab::cpu
