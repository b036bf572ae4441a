// One row of logits on its way to a token, by one threadgroup: penalties, filters, the draw. Shared
// by `sample` and the verifiers, so that plain and speculative decoding choose by the same code.
//
// Nothing is sorted. Tokens rank by one integer, "logit descending, then token ascending"
// (rank_key); top-k and top-p are a cut in that ranking, found by bisection: a pass over the row
// adds up how many tokens, or how much mass, stand at or above three places. Masses are integers,
// so that the threads' sums are the same in any order.
#pragma once

#include "element.h"
#include "group.h"
#include "inferlab/sampling.h"
#include "inferlab/weights.h"

constant constexpr uint kThreads = INFERLAB_GROUP;
constant constexpr uint kSimds = kThreads / kSimd;
constant constexpr float kLowestFloat = -3.402823466e38f;
constant constexpr float kSmallestNormal = 1.17549435e-38f;

struct RowShared {
  ulong parts[3][kSimds];
};

// What a kernel knows of itself: its shared memory and which thread this is.
struct Group {
  threadgroup RowShared* shared;
  uint tid;
};

inline ulong group_max(Group g, ulong x) {
  return group_reduce<Max, kThreads>(x, g.shared->parts[0], g.tid);
}
inline ulong group_sum(Group g, ulong x) {
  return group_reduce<Add, kThreads>(x, g.shared->parts[0], g.tid);
}

struct Sums {
  ulong a, b, c;
};

inline Sums group_sums(Group g, Sums x) {
  x.a = simd_reduce<Add>(x.a);
  x.b = simd_reduce<Add>(x.b);
  x.c = simd_reduce<Add>(x.c);
  group_barrier();
  if (g.tid % kSimd == 0) {
    g.shared->parts[0][g.tid / kSimd] = x.a;
    g.shared->parts[1][g.tid / kSimd] = x.b;
    g.shared->parts[2][g.tid / kSimd] = x.c;
  }
  group_barrier();
  x = Sums{0, 0, 0};
  for (uint i = 0; i < kSimds; ++i) {
    x.a += g.shared->parts[0][i];
    x.b += g.shared->parts[1][i];
    x.c += g.shared->parts[2][i];
  }
  return x;
}

// ---- rows ---------------------------------------------------------------------------------------

// Logits as they came, or a float copy that penalties changed.
struct Row {
  device const Element* raw;
  device const float* changed;  // null: as they came
  long size;                    // columns that may be chosen

  float at(long t) const { return changed != nullptr ? changed[t] : to_float(raw[t]); }
  // Low bits of the float's bits that all elements have in common.
  uint common_bits() const {
    return changed != nullptr || kElement == DType::kF32 ? 0 : kElement == DType::kF16 ? 13 : 16;
  }
};

// The tensors of SamplingTensors, in its order; SamplingParams says which of the optional ones are
// there.
struct Sampling {
  device const float* temperature;
  device const int* top_k;
  device const float* top_p;
  device const float* min_p;
  device const long* seed;
  device const float* repetition;
  device const float* presence;
  device const float* frequency;
  device const int* context_tokens;
  device const int* context_lens;
  device const int* prompt_lens;
  device const int* bias_tokens;
  device const float* bias_values;
};

// What one sequence asks for.
struct Choice {
  float temperature;
  int top_k;
  float top_p, min_p;
  ulong seed;

  bool greedy() const { return temperature < kGreedyTemperature; }
  bool filters(long size) const {
    return (top_k > 0 && top_k < size) || top_p < 1.0f || min_p > 0.0f;
  }
};

inline Choice choice_of(Sampling s, long b) {
  return Choice{s.temperature[b], s.top_k[b], s.top_p[b], s.min_p[b], ulong(s.seed[b])};
}

// weight = exp((logit - max) * inv_temperature)
struct Softmax {
  float max, inv_temperature;

  float log_weight(float logit) const { return (logit - max) * inv_temperature; }
  float weight(float logit) const { return weight_exp(log_weight(logit)); }
};

inline Softmax softmax_of(Choice choice, float max) {
  return Softmax{max, 1.0f / choice.temperature};
}

// Everything but -inf.
inline ulong keep_all() { return rank_key(kLowestFloat, 0xffffffffu); }

// The copy of `row` with penalties and biases of sequence b in it; the row itself where there are
// none. `path`: tokens on the way to this row behind the end of the context. `copy` [size] is first
// how often each token occurred (bit 31: at all; the rest: in the output), then the logits.
inline Row penalised(Group g, Row row, Sampling s, constant SamplingParams& sizes, long b,
                     device const int* path, long path_size, device float* copy) {
  const float repetition = sizes.repetition_penalty != 0 ? s.repetition[b] : 1.0f;
  const float presence = sizes.presence_penalty != 0 ? s.presence[b] : 0.0f;
  const float frequency = sizes.frequency_penalty != 0 ? s.frequency[b] : 0.0f;
  const bool penalties = repetition != 1.0f || presence != 0.0f || frequency != 0.0f;
  if (!penalties && sizes.bias_size == 0) return row;
  device uint* counts = reinterpret_cast<device uint*>(copy);
  for (long t = g.tid; t < row.size; t += kThreads) counts[t] = 0;
  device_barrier();
  if (penalties) {
    device const int* context = s.context_tokens + b * sizes.context_size;
    long length = s.context_lens[b];
    length = length < 0 ? 0 : length < sizes.context_size ? length : sizes.context_size;
    device atomic_uint* shared_counts = reinterpret_cast<device atomic_uint*>(counts);
    for (long i = g.tid; i < length + path_size; i += kThreads) {
      const long t = i < length ? context[i] : path[i - length];
      if (t < 0 || t >= row.size) continue;
      atomic_fetch_or_explicit(&shared_counts[t], 0x80000000u, memory_order_relaxed);
      if (i >= s.prompt_lens[b]) {
        atomic_fetch_add_explicit(&shared_counts[t], 1u, memory_order_relaxed);
      }
    }
    device_barrier();
  }
  for (long t = g.tid; t < row.size; t += kThreads) {
    const uint count = counts[t] & 0x7fffffffu;
    float x = row.at(t);
    if (counts[t] != 0 && repetition != 1.0f) x = x > 0.0f ? x / repetition : x * repetition;
    if (count > 0) x = (x - frequency * float(count)) - presence;
    copy[t] = x;
  }
  device_barrier();
  // A token's biases are added in order, by the thread of the first.
  device const int* tokens = s.bias_tokens + b * sizes.bias_size;
  device const float* values = s.bias_values + b * sizes.bias_size;
  for (long j = g.tid; j < sizes.bias_size; j += kThreads) {
    const long t = tokens[j];
    bool first = t >= 0 && t < row.size;
    for (long i = 0; i < j && first; ++i) first = tokens[i] != t;
    for (long i = j; i < sizes.bias_size && first; ++i) {
      if (tokens[i] == t) copy[t] = copy[t] + values[i];
    }
  }
  device_barrier();
  row.changed = copy;
  return row;
}

// The largest logit; false: a NaN, +inf, or nothing but -inf.
inline bool scan(Group g, Row row, thread float& max) {
  ulong best = 0;  // bit 32: NaN
  for (long t = g.tid; t < row.size; t += kThreads) {
    const float x = row.at(t);
    const bool nan = (noise_to_bits(x) & 0x7fffffffu) > 0x7f800000u;
    best = Max::of(best, nan ? 1UL << 32 : ulong(ordered_bits(x)));
  }
  best = group_max(g, best);
  max = from_ordered(uint(best));
  return best >> 32 == 0 && max >= kLowestFloat && max <= -kLowestFloat;
}

// ---- filters ------------------------------------------------------------------------------------

// What is added up: one per token, or its mass; tokens below `floor` in the ranking do not count.
struct Measure {
  bool by_mass;
  ulong floor;
  Softmax softmax;

  ulong of(float logit, long t) const {
    if (rank_key(logit, uint(t)) < floor) return 0;
    return by_mass ? mass_of(softmax.weight(logit)) : 1;
  }
};

inline ulong total(Group g, Row row, Measure measure) {
  ulong sum = 0;
  for (long t = g.tid; t < row.size; t += kThreads) sum += measure.of(row.at(t), t);
  return group_sum(g, sum);
}

// The place in the ranking down to and with which the measure reaches `target`, which is at least 1
// and at most the total. First the logit is found, then the token among those that tie.
inline ulong cut_at(Group g, Row row, Measure measure, ulong target, float max, ulong all) {
  const uint shift = row.common_bits();
  // At `low` the measure reaches the target, at `high` it does not.
  ulong low = 0, high = (ordered_bits(max) >> shift) + 1, at_low = all, at_high = 0;
  while (high - low > 1) {
    const ulong step = (high - low + 3) / 4;
    const ulong p1 = low + step, p2 = Max::of(p1, low + 2 * step), p3 = Max::of(p2, low + 3 * step);
    Sums sums{0, 0, 0};
    for (long t = g.tid; t < row.size; t += kThreads) {
      const float x = row.at(t);
      const ulong place = ordered_bits(x) >> shift;
      if (place < p1) continue;
      const ulong m = measure.of(x, t);
      sums.a += m;
      sums.b += place >= p2 ? m : 0;
      sums.c += place >= p3 ? m : 0;
    }
    sums = group_sums(g, sums);
    const ulong places[5] = {low, p1, p2, p3, high};
    const ulong reached[5] = {at_low, sums.a, sums.b, sums.c, at_high};
    for (uint i = 1; i < 4; ++i) {
      if (places[i] >= high) continue;
      if (reached[i] >= target) {
        low = places[i];
        at_low = reached[i];
      }
    }
    for (uint i = 3; i >= 1; --i) {
      if (places[i] < high && reached[i] < target) {
        high = places[i];
        at_high = reached[i];
      }
    }
  }
  const uint logit_bits = uint(low) << shift;
  // All that tie have the same measure: so many of them are needed, those with the lowest ids.
  ulong tie = 0;
  for (long t = g.tid; t < row.size; t += kThreads) {
    const float x = row.at(t);
    if (ordered_bits(x) >> shift == low) tie = Max::of(tie, measure.of(x, t));
  }
  tie = group_max(g, tie);
  const ulong needed = (target - at_high + tie - 1) / tie;
  if (needed * tie >= at_low - at_high) return ulong(logit_bits) << 32;
  long before = -1, last = row.size - 1;  // too few up to `before`, enough up to `last`
  while (last - before > 1) {
    const long step = (last - before + 3) / 4;
    const long p1 = before + step, p2 = before + 2 * step, p3 = before + 3 * step;
    Sums sums{0, 0, 0};
    for (long t = g.tid; t < row.size && t <= p3; t += kThreads) {
      const float x = row.at(t);
      if (ordered_bits(x) >> shift != low || rank_key(x, uint(t)) < measure.floor) continue;
      sums.a += t <= p1 ? 1 : 0;
      sums.b += t <= p2 ? 1 : 0;
      sums.c += 1;
    }
    sums = group_sums(g, sums);
    if (p3 < last) {
      if (sums.c >= needed)
        last = p3;
      else
        before = p3;
    }
    if (p2 < last && p2 > before) {
      if (sums.b >= needed)
        last = p2;
      else
        before = p2;
    }
    if (p1 < last && p1 > before) {
      if (sums.a >= needed)
        last = p1;
      else
        before = p1;
    }
  }
  // All that tie have this logit; its bits are those of any of them.
  ulong key = 0;
  for (long t = g.tid; t < row.size; t += kThreads) {
    if (t == last) key = rank_key(row.at(t), uint(t));
  }
  return group_max(g, key);
}

inline ulong top_k_cut(Group g, Row row, float max, long k) {
  const Measure count{false, keep_all(), Softmax{0.0f, 0.0f}};
  const ulong finite = total(g, row, count);
  return finite <= ulong(k) ? keep_all() : cut_at(g, row, count, ulong(k), max, finite);
}

// The smallest logit whose weight is at least min_p, by bisection over the floats.
inline ulong min_p_cut(Softmax softmax, float min_p) {
  ulong low = ordered_bits(kLowestFloat), high = ordered_bits(softmax.max);
  while (low < high) {
    const ulong mid = low + (high - low) / 2;
    if (softmax.weight(from_ordered(uint(mid))) >= min_p) {
      high = mid;
    } else {
      low = mid + 1;
    }
  }
  return high << 32;
}

// The last place in the ranking that top-k, top-p and min-p keep.
inline ulong find_cut(Group g, Row row, float max, Choice choice) {
  const Softmax softmax = softmax_of(choice, max);
  ulong cut = keep_all();
  if (choice.min_p > 0.0f) cut = min_p_cut(softmax, choice.min_p);
  ulong best_k = keep_all();
  if (choice.top_k > 0 && choice.top_k < row.size) best_k = top_k_cut(g, row, max, choice.top_k);
  cut = Max::of(cut, best_k);
  if (choice.top_p < 1.0f) {
    const Measure mass{true, best_k, softmax};
    const ulong all = total(g, row, mass);
    cut = Max::of(cut, cut_at(g, row, mass, mass_target(choice.top_p, all), max, all));
  }
  return cut;
}

// ---- the draw -----------------------------------------------------------------------------------

constant constexpr uint kScoreLogit = 0;      // the element itself
constant constexpr uint kScoreGumbel = 1;     // element / temperature + noise
constant constexpr uint kScoreLogGumbel = 2;  // log(element) + noise: the elements are weights

struct Draw {
  uint score;
  float temperature;
  ulong seed;
  uint position, purpose;
  ulong cut;
};

// The best token by score among those ranked before `below`, as a rank key of its score; 0: none.
// A thread takes four tokens at a time, those of one Philox block.
inline ulong draw_below(Group g, Row row, Draw draw, ulong below) {
  ulong best = 0;
  for (long block = g.tid; block * 4 < row.size; block += kThreads) {
    PhiloxBlock words{{0, 0, 0, 0}};
    if (draw.score != kScoreLogit) {
      words = philox4x32_10(draw.position, uint(block), draw.purpose, 0, uint(draw.seed),
                            uint(draw.seed >> 32));
    }
    for (uint j = 0; j < 4; ++j) {
      const long t = block * 4 + j;
      if (t >= row.size) break;
      const float x = row.at(t);
      if (rank_key(x, uint(t)) < draw.cut) continue;
      float score = x;
      if (draw.score == kScoreGumbel) score = x / draw.temperature + noise_gumbel(words.w[j]);
      if (draw.score == kScoreLogGumbel) score = noise_log(x) + noise_gumbel(words.w[j]);
      if (!(score >= kLowestFloat)) continue;
      const ulong key = rank_key(score, uint(t));
      if (key < below) best = Max::of(best, key);
    }
  }
  return group_max(g, best);
}

inline int draw_one(Group g, Row row, Draw draw) {
  const ulong key = draw_below(g, row, draw, ~0UL);
  return key == 0 ? -1 : key_token(key);
}

inline Draw draw_of(Choice choice, uint position, uint purpose, ulong cut) {
  return Draw{choice.greedy() ? kScoreLogit : kScoreGumbel,
              choice.temperature,
              choice.seed,
              position,
              purpose,
              cut};
}

// Scan and filters: the draw that is then made. False as for scan.
inline bool open_draw(Group g, Row row, Choice choice, uint position, uint purpose,
                      thread Draw& draw) {
  float max;
  if (!scan(g, row, max)) return false;
  const bool filtered = !choice.greedy() && choice.filters(row.size);
  draw = draw_of(choice, position, purpose, filtered ? find_cut(g, row, max, choice) : keep_all());
  return true;
}
