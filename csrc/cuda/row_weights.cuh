// The weights of a row: the softmax of what a filter keeps, not divided by its sum. For rules that
// look at probabilities.
//
// Floats are added exactly, as integers, so that a sum is the same whatever the number of blocks
// and the order. The CPU adds doubles in an order of its own: the two differ in a double's last
// bits.
#pragma once

#include "row_filters.cuh"

namespace inferlab::cuda {

// A sum of less than 2^23 floats in [0, 4), in parts of 40 bits with room for carries: part i
// counts units of 2^(-40 (i + 1)). The last has the smallest subnormal.
struct Sum {
  uint64_t part[kSumParts] = {};

  __device__ __forceinline__ void add(float x) {
    const uint32_t bits = noise_to_bits(x) & 0x7fffffffu, exponent = bits >> 23;  // -0 is 0
    const uint64_t mantissa = exponent > 0 ? (bits & 0x7fffffu) | 0x800000u : bits;
    if (exponent >= 70) {  // all of it in the first two parts
      const int shift = static_cast<int>(exponent) - 70;
      const uint64_t v = shift >= 40 ? 0 : mantissa << shift;
      part[0] += shift >= 40 ? mantissa << (shift - 40) : v >> 40;
      part[1] += v & kPartMask;
    } else {
      const int shift = static_cast<int>(exponent > 0 ? exponent : 1u) + 10;  // over 2^-160
      const uint64_t v = mantissa << (shift >= 40 ? shift - 40 : shift);
      part[1] += shift >= 40 ? v >> 40 : 0;
      part[2] += shift >= 40 ? v & kPartMask : v >> 40;
      part[3] += shift >= 40 ? 0 : v & kPartMask;
    }
  }
  __device__ __forceinline__ Sum& operator-=(const Sum& other) {
    for (int i = 0; i < kSumParts; ++i) part[i] -= other.part[i];  // a part may borrow
    return *this;
  }
  __device__ __forceinline__ double value() const {
    double sum = 0.0;
    int64_t carry = 0;
    uint64_t rest[kSumParts];
#pragma unroll
    for (int i = kSumParts - 1; i >= 0; --i) {
      carry += static_cast<int64_t>(part[i]);
      rest[i] = i > 0 ? static_cast<uint64_t>(carry) & kPartMask : static_cast<uint64_t>(carry);
      carry >>= 40;
    }
    sum = static_cast<double>(rest[3]) * 0x1p-160 + static_cast<double>(rest[2]) * 0x1p-120;
    return sum + static_cast<double>(rest[1]) * 0x1p-80 + static_cast<double>(rest[0]) * 0x1p-40;
  }

 private:
  static constexpr uint64_t kPartMask = (uint64_t{1} << 40) - 1;
};

__device__ __forceinline__ Sum sum_of(float x) {
  Sum sum;
  sum.add(x);
  return sum;
}

// The sum over all threads of all blocks of a group. Ends the round.
__device__ inline Sum meet_sum(Group& group, const Sum& mine) {
#pragma unroll
  for (int i = 0; i < kSumParts; ++i) {
    const uint64_t part = warp_sum(mine.part[i]);
    if (lane_index() == 0 && part != 0) atomic_add(&group.shared.mine.sum[i], part);
  }
  const Board& seen = group.meet();
  Sum sum;
#pragma unroll
  for (int i = 0; i < kSumParts; ++i) sum.part[i] = seen.sum[i];
  return sum;
}

struct Weights {
  float max, inv_temperature;
  Cut cut;

  __device__ __forceinline__ float log_of(float l) const { return (l - max) * inv_temperature; }
  __device__ __forceinline__ float of(float l, uint32_t token) const {
    return cut.keeps(l, token) ? weight_exp(log_of(l)) : 0.0f;
  }
};

// Sum over the row of value(token, logit) in [0, 4). Ends the round.
template <typename T, typename F>
__device__ Sum sum_row(Group& group, const Row<T>& row, F value) {
  Sum mine;
  for_vectors(group, row, [&](uint32_t first, const float (&x)[Row<T>::kPer]) {
#pragma unroll
    for (int i = 0; i < Row<T>::kPer; ++i) mine.add(value(first + i, x[i]));
  });
  return meet_sum(group, mine);
}

// The token of the largest score down to the cut. Ends the round.
template <typename T>
__device__ int32_t draw_kept(Group& group, const Row<T>& row, const Choice& choice,
                             const Draw& draw, Cut cut) {
  Best best;
  float reached = -infinity();
  for_vectors(group, row, [&](uint32_t first, const float (&x)[Row<T>::kPer]) {
    if (choice.greedy) {
      best.offer_logits(x, first);
    } else {
      best.offer_noisy(x, first, draw, choice, cut, reached);
    }
  });
  group.tell_best(best.key(), false);
  return token_of(group.meet().best);
}

}  // namespace inferlab::cuda
