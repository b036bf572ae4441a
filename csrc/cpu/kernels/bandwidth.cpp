// Reads `n` floats (a multiple of 64) with four accumulators, so that the loads are the limit.
#include "simd.h"

namespace inferlab::cpu::INFERLAB_ISA {

float sum_chunk(const float* data, int64_t n) {
  vf a = vset(0.0f), b = a, c = a, d = a;
  for (int64_t i = 0; i < n; i += 4 * kLanes) {
    a = a + vload(data + i);
    b = b + vload(data + i + kLanes);
    c = c + vload(data + i + 2 * kLanes);
    d = d + vload(data + i + 3 * kLanes);
  }
  return vreduce_add((a + b) + (c + d));
}

}  // namespace inferlab::cpu::INFERLAB_ISA
