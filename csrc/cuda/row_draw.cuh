// The arg-max of logits, or of logit / temperature + Gumbel noise, over what a filter keeps. Words
// of Philox are computed four tokens at a time; the two logarithms of the noise only where a
// token's logit and the leading zeros of its word say that it may still win: a handful of times per
// warp.
#pragma once

#include "row.cuh"

namespace inferlab::cuda {

// Tokens rank by logit, then by lower id; a filter keeps those down to and with the cut.
struct Cut {
  float logit;
  uint32_t token;
  __device__ __forceinline__ bool keeps(float l, uint32_t t) const {
    return l > logit || (l == logit && t <= token);
  }
};
__device__ __forceinline__ Cut keep_all() { return Cut{lowest(), 0xffffffffu}; }  // all but -inf
__device__ __forceinline__ Cut stricter(Cut a, Cut b) {
  if (a.logit != b.logit) return a.logit > b.logit ? a : b;
  return a.token < b.token ? a : b;
}

constexpr float kLeastGumbel = -2.82f, kMostGumbel = 22.89f;  // noise_gumbel's values lie between

class Draw {
 public:
  __device__ __forceinline__ Draw(const Choice& choice, uint32_t position, uint32_t purpose)
      : choice_(choice), position_(position), purpose_(purpose) {}

  __device__ __forceinline__ bool greedy() const { return choice_.greedy; }

  // The score of a token.
  __device__ __forceinline__ float score(float l, uint32_t token) const {
    if (choice_.greedy) return l;
    return l / choice_.temperature + gumbel(choice_.seed, position_, token, purpose_);
  }

  // Calls f(token, logit, score) for those of a vector whose score can reach `least` or is close to
  // doing so. Not for greedy draws.
  template <int kPer, typename F>
  __device__ __forceinline__ void near(const float (&x)[kPer], uint32_t first, float least,
                                       F f) const {
    const float inv = choice_.inv_temperature;
    uint32_t candidates = 0;
#pragma unroll
    for (int at = 0; at < kPer; at += 4) {
      const float z = fmaxf(fmaxf(x[at], x[at + 1]), fmaxf(x[at + 2], x[at + 3])) * inv;
      // Covers the rounding of the noise and of the scores. Comparisons are so that NaN passes.
      const float bound = least - 1e-3f - 1e-6f * (fabsf(least) + fabsf(z));
      if (z + kMostGumbel < bound || !(z > -infinity())) continue;
      const PhiloxBlock block = inferlab::philox4x32_10(position_, (first + at) / 4, purpose_, 0u,
                                                        static_cast<uint32_t>(choice_.seed),
                                                        static_cast<uint32_t>(choice_.seed >> 32));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // A word with c leading zeros gives u >= 2^-(c + 1), and noise <= -log u.
        const float most = static_cast<float>(__clz(static_cast<int>(block.w[i])) + 1) * 0.6931472f;
        const bool out = x[at + i] * inv + most < bound || !(x[at + i] > -infinity());
        candidates |= out ? 0u : 1u << (at + i);
      }
    }
    while (candidates != 0) {
      const int i = __ffs(static_cast<int>(candidates)) - 1;
      candidates &= candidates - 1;
      float l = x[0];
#pragma unroll
      for (int j = 1; j < kPer; ++j) l = j == i ? x[j] : l;  // registers cannot be indexed
      f(first + i, l, score(l, first + i));
    }
  }

 private:
  const Choice& choice_;
  uint32_t position_, purpose_;
};

// The best (score, token) that a thread has seen: largest score, then lowest token.
class Best {
 public:
  __device__ __forceinline__ void offer(float score, uint32_t token) {
    if (score > score_ || (score == score_ && token < token_ && score > -infinity())) {
      score_ = score;
      token_ = token;
    }
  }

  // The logits themselves, in ascending order of tokens.
  template <int kPer>
  __device__ __forceinline__ void offer_logits(const float (&x)[kPer], uint32_t first) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (x[i] > score_) {
        score_ = x[i];
        token_ = first + i;
      }
    }
  }

  // Scores under noise. `reached`: a score that the best of all is known to reach, raised here.
  // Called by whole warps.
  template <int kPer>
  __device__ __forceinline__ void offer_noisy(const float (&x)[kPer], uint32_t first,
                                              const Draw& draw, const Choice& choice, Cut cut,
                                              float& reached) {
    float most = x[0];
#pragma unroll
    for (int i = 1; i < kPer; ++i) most = fmaxf(most, x[i]);
    // The largest of a row is kept by every filter; of a vector, only if the cut lies below it.
    float sure = score_;
    if (most > cut.logit) sure = fmaxf(sure, most * choice.inv_temperature + kLeastGumbel);
    const uint32_t warp = __reduce_max_sync(kAllLanes, ordered_bits(sure));
    reached = fmaxf(reached, from_ordered(warp));
    draw.near(x, first, reached, [&](uint32_t token, float l, float score) {
      if (cut.keeps(l, token)) offer(score, token);
    });
  }

  __device__ __forceinline__ uint64_t key() const {
    return score_ > -infinity() ? rank_key(score_, token_) : 0;
  }

 private:
  float score_ = -infinity();
  uint32_t token_ = 0xffffffffu;
};

// The token of the best key, -1 if there is none.
__device__ __forceinline__ int32_t token_of(uint64_t key) { return key == 0 ? -1 : key_token(key); }

// Scans and draws in one pass and one meeting: for rows that no filter cuts. -1: nothing can be
// sampled from this row.
template <typename T>
__device__ int32_t choose_unfiltered(Group& group, const Row<T>& row, const Choice& choice,
                                     const Draw& draw) {
  Best best;
  bool bad = false;
  float reached = -infinity();
  for_vectors(group, row, [&](uint32_t first, const float (&x)[Row<T>::kPer]) {
#pragma unroll
    for (int i = 0; i < Row<T>::kPer; ++i) bad |= !(x[i] < infinity());
    if (choice.greedy) {
      best.offer_logits(x, first);
    } else {
      best.offer_noisy(x, first, draw, choice, keep_all(), reached);
    }
  });
  group.tell_best(best.key(), bad);
  const Board& seen = group.meet();
  return seen.bad != 0 ? -1 : token_of(seen.best);
}

}  // namespace inferlab::cuda
