// Passes over one row of logits: the parts that the sampler and the verifiers are made of, compiled
// once per instruction set. Every result is the same bits on each of them: element-wise fp32,
// comparisons, integers, and sums in a fixed order.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>

#include "inferlab/dtype.h"
#include "inferlab/weights.h"
#include "isa.h"

namespace inferlab::cpu {

// Small helpers are inlined by force: as ordinary inline functions the linker would keep one copy,
// perhaps the one compiled for an instruction set that this processor lacks.
#define INFERLAB_INLINE inline __attribute__((always_inline))

// What a thread takes at a time, and the unit in which sums are ordered.
constexpr int64_t kChunk = 16384;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

struct Row {
  const void* data;  // [size]
  DType dtype;
  int64_t size;      // columns that may be chosen
  int block;         // 64 or 256: what one entry of block_max covers
  float* block_max;  // [ceil(size / block)]
};

// Tokens rank by logit, then by lower id; a filter keeps those down to and with the cut.
struct Cut {
  float logit;
  int32_t token;
  INFERLAB_INLINE bool keeps(float l, int64_t t) const {
    return l > logit || (l == logit && t <= token);
  }
};
constexpr Cut kKeepAll{kLowest, std::numeric_limits<int32_t>::max()};  // all but -inf

// The best `capacity` (score, token) pairs so far: descending score, then ascending token.
struct Top {
  float* score;    // [capacity]
  int32_t* token;  // [capacity]
  int capacity;
  int count;

  INFERLAB_INLINE float threshold() const { return count < capacity ? -kInf : score[count - 1]; }
  INFERLAB_INLINE void offer(float s, int32_t t) {
    if (!(s > -kInf)) return;
    int i = count;
    while (i > 0 && (s > score[i - 1] || (s == score[i - 1] && t < token[i - 1]))) --i;
    if (i == capacity || (i > 0 && score[i - 1] == s && token[i - 1] == t)) return;
    if (count < capacity) ++count;
    for (int j = count - 1; j > i; --j) {
      score[j] = score[j - 1];
      token[j] = token[j - 1];
    }
    score[i] = s;
    token[i] = t;
  }
};

enum class Score {
  kLogit,      // the element itself
  kGumbel,     // element / temperature + noise
  kLogGumbel,  // log(element) + noise: the elements are weights
};

struct Draw {
  Score score;
  float temperature;
  uint64_t seed;
  uint32_t position;
  uint32_t purpose;
  Cut cut;
  std::atomic<float>* floor;  // null, or a score that the result is known to reach
};

// Of an unfiltered draw: scanned and drawn from in turns, while the next piece is on its way.
constexpr int64_t kPiece = 4096;

// weight = exp((logit - max) * inv_temperature)
struct Softmax {
  float max;
  float inv_temperature;
};

// fn(row's elements as T, ...) for the row's element type T.
#define INFERLAB_BY_DTYPE(row, fn, ...)                                                   \
  ((row).dtype == DType::kF32    ? fn(static_cast<const float*>((row).data), __VA_ARGS__) \
   : (row).dtype == DType::kBF16 ? fn(static_cast<const bf16*>((row).data), __VA_ARGS__)  \
                                 : fn(static_cast<const f16*>((row).data), __VA_ARGS__))

// Fills block_max of [begin, end); false if there is a NaN. begin is a multiple of kChunk.
INFERLAB_DECLARE_KERNEL(bool, scan_blocks, const Row&, int64_t, int64_t)
// Offers the elements of [begin, end) that may be among the best. begin as above.
INFERLAB_DECLARE_KERNEL(void, draw_blocks, const Row&, int64_t, int64_t, const Draw&, Top&)
// Both in one, in pieces: noise is computed for one while the next is read from memory.
INFERLAB_DECLARE_KERNEL(bool, scan_and_draw, const Row&, int64_t, int64_t, const Draw&, Top&)
// The largest element of [begin, end), begin a multiple of kPiece, and the first token that has it
// (-1: all are -inf); false if there is a NaN.
INFERLAB_DECLARE_KERNEL(bool, find_largest, const Row&, int64_t, int64_t, float*, int32_t*)
// Rank keys of all elements >= least; returns how many.
INFERLAB_DECLARE_KERNEL(int64_t, collect_keys, const Row&, float, uint64_t*)
INFERLAB_DECLARE_KERNEL(int64_t, count_at_least, const Row&, float)
// float32 copy of [begin, end).
INFERLAB_DECLARE_KERNEL(void, widen, const Row&, int64_t, int64_t, float*)
// Sum of the weights that `cut` keeps in [begin, end); stores them (0 where not kept) unless null.
INFERLAB_DECLARE_KERNEL(double, sum_weights, const Row&, int64_t, int64_t, Softmax, Cut, float*)
// Sum of the masses of [begin, end).
INFERLAB_DECLARE_KERNEL(uint64_t, sum_masses, const Row&, int64_t, int64_t, Softmax)
// Sum of weight * log weight over the kept.
INFERLAB_DECLARE_KERNEL(double, sum_weighted_logs, const Row&, int64_t, int64_t, Softmax, Cut)
// Sum of the kept weights whose |log weight - center| is below `distance`, or equal and the token
// below `token`.
INFERLAB_DECLARE_KERNEL(double, sum_nearer, const Row&, int64_t, int64_t, Softmax, Cut, float,
                        float, int64_t)
// out = max(p * p_scale - q * q_scale, 0); returns its sum.
INFERLAB_DECLARE_KERNEL(double, sum_residual, const float*, const float*, float, float, int64_t,
                        float*)
INFERLAB_DECLARE_KERNEL(double, sum_floats, const float*, int64_t)
// Masses of keys.
INFERLAB_DECLARE_KERNEL(void, key_masses, const uint64_t*, int64_t, Softmax, uint64_t*)
// The masses of all finite elements of [begin, end), added up by how far their log weight is
// below 0: kMassBuckets of 1/16 each, the last one open.
constexpr int kMassBuckets = 512;
INFERLAB_DECLARE_KERNEL(void, mass_histogram, const Row&, int64_t, int64_t, Softmax, uint64_t*)
// Rank keys of the elements of one such bucket; returns how many.
INFERLAB_DECLARE_KERNEL(int64_t, collect_bucket, const Row&, Softmax, int, uint64_t*)
INFERLAB_DECLARE_KERNEL(float, exp_one, float)
INFERLAB_DECLARE_KERNEL(void, gumbel_fill, uint64_t, uint32_t, uint32_t, float*, int64_t)

}  // namespace inferlab::cpu
