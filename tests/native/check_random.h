// Random numbers for the programs beside it, the same on every machine.
#pragma once

#include <cstdint>

struct Random {
  uint64_t state = 1;
  uint32_t next() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state >> 33);
  }
  float number() { return static_cast<float>(next() % 2001) / 1000.0f - 1.0f; }
};
