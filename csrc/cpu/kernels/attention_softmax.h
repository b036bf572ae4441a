// Softmax over chunks of positions: one row's exponentials, and the merging of what chunks found.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_simd.h"
#include "attention_task.h"

namespace inferlab::cpu::INFERLAB_ISA {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// Rows' running softmax: m (maximum), l (sum of exponentials), acc (weighted values).
struct State {
  float* m;
  float* l;
  float* acc;
};

// What a row found in a chunk; m = -inf: it sees nothing there.
struct Softened {
  float m, l;
};

// Scores of one row -> exponentials, in place. Lanes are counted from the chunk's start, and places
// outside `keys` count as e^-inf, up to whole vectors of kMaxLanes. each(): called for every
// vector.
template <typename F>
Softened soften(float* s, Range keys, float softcap, const F& each) {
  if (keys.empty()) return {kNegInf, 0.0f};
  const int64_t first = keys.begin & ~int64_t{kMaxLanes - 1};
  const int64_t last = (keys.end + kMaxLanes - 1) & ~int64_t{kMaxLanes - 1};
  uint32_t nan = 0;
  if (softcap > 0.0f) {
    const vf cap = vset(softcap), inverse = vset(1.0f / softcap);
    for (int64_t i = keys.begin; i < keys.end; ++i) nan |= std::isnan(s[i]) ? 1u : 0u;
    for (int64_t i = first; i < last; i += kLanes) {
      vstore(s + i, cap * vtanh(vload(s + i) * inverse));
    }
  }
  std::fill(s + first, s + keys.begin, kNegInf);
  std::fill(s + keys.end, s + last, kNegInf);
  vf top = vset(kNegInf);
  for (int64_t i = first; i < last; i += kLanes) {
    const vf x = vload(s + i);
    nan |= visnan(x);
    top = vmax(x, top);
  }
  const float m = vreduce_max(top);
  const vf shift = vset(m);
  // Below this the result would be subnormal, which costs a hundred cycles and is lost in the sum.
  const vf floor = vset(-87.0f);
  vf sum = vset(0.0f);
  for (int64_t i = first; i < last; i += kLanes) {
    each();
    const vf x = vload(s + i) - shift;
    const vf e = vselect_lt(x, floor, vset(0.0f), vexp(vmax(x, floor)));
    vstore(s + i, e);
    sum = sum + e;
  }
  // As a softmax would: the row is NaN. vexp alone would turn a NaN into a 0.
  if (nan != 0 || !std::isfinite(m)) return {0.0f, std::numeric_limits<float>::quiet_NaN()};
  return {m, vreduce_add(sum)};
}

// Rows of `from` into rows of `into`: M = max(m, m'), l = l e^(m-M) + l' e^(m'-M), acc likewise.
inline void merge(const State& from, const State& into, int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    if (from.m[r] == kNegInf) continue;
    float* to = into.acc + r * stride;
    const float* add = from.acc + r * stride;
    if (into.m[r] == kNegInf) {
      into.m[r] = from.m[r];
      into.l[r] = from.l[r];
      std::memcpy(to, add, sizeof(float) * static_cast<size_t>(stride));
      continue;
    }
    const float top = std::max(into.m[r], from.m[r]);
    const float less = std::exp(std::min(into.m[r], from.m[r]) - top);
    const float keep = into.m[r] < top ? less : 1.0f;
    const float gain = from.m[r] < top ? less : 1.0f;
    into.m[r] = top;
    into.l[r] = into.l[r] * keep + from.l[r] * gain;
    const vf a = vset(keep), b = vset(gain);
    for (int64_t d = 0; d < stride; d += kLanes) {
      vstore(to + d, vfma(vload(add + d), b, vload(to + d) * a));
    }
  }
}

}  // namespace inferlab::cpu::INFERLAB_ISA
