// Streams memory once: the yardstick that memory-bound ops are held against.
#pragma once

#include <cstdint>

#include "inferlab/status.h"

namespace inferlab {

struct ReadParams {
  const float* data;  // [count]
  int64_t count;      // a multiple of 64
  float sum;          // out: keeps the reads from being optimised away
};

namespace cpu {
Status read_memory(ReadParams& params);
}
}  // namespace inferlab
