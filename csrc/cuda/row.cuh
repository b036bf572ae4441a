// One row of logits as a kernel reads it: 16 bytes at a time, as floats; and what one sequence asks
// for. A row that penalties change is read from its float copy (row_penalties.cuh).
#pragma once

#include "convert.cuh"
#include "inferlab/sampling.h"
#include "inferlab/weights.h"
#include "row_group.cuh"

namespace inferlab::cuda {

__device__ __forceinline__ float infinity() { return noise_from_bits(0x7f800000u); }
__device__ __forceinline__ float lowest() { return noise_from_bits(0xff7fffffu); }  // finite

template <typename T>
struct Row {
  static constexpr int kPer = kPerVector<T>;  // elements of a vector of T

  const void* data;  // [size], of T or, where `penalised`, of float
  uint32_t size;     // columns that may be chosen
  bool penalised;

  __device__ __forceinline__ bool wide() const { return sizeof(T) == 4 || penalised; }
  __device__ __forceinline__ uint32_t per_vector() const { return wide() ? 4u : kPer; }

  // Any block's slice, once the group has met. The copy is rewritten row after row by all of them,
  // so what this multiprocessor's cache has of it may be old.
  __device__ __forceinline__ float at(uint32_t token) const {
    return wide() ? __ldcg(static_cast<const float*>(data) + token)
                  : load_float(static_cast<const T*>(data)[token]);
  }

  // The vector at `token`, a multiple of per_vector(). Elements from `end` on are -inf.
  __device__ __forceinline__ uint4 fetch(uint32_t token, uint32_t end) const {
    const uint32_t bytes = wide() ? 4u : sizeof(T);
    const uint32_t minus_infinity = wide()                   ? 0xff800000u
                                    : std::is_same_v<T, f16> ? 0xfc00fc00u
                                                             : 0xff80ff80u;
    if (token >= end) {
      return make_uint4(minus_infinity, minus_infinity, minus_infinity, minus_infinity);
    }
    const char* p = static_cast<const char*>(data) + static_cast<uint64_t>(token) * bytes;
    if (token + per_vector() <= end && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
      return *reinterpret_cast<const uint4*>(p);
    }
    // The row's end, and rows that do not begin at a multiple of 16 bytes.
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[i] = minus_infinity;
      if (wide()) {
        if (token + i < end) word[i] = reinterpret_cast<const uint32_t*>(p)[i];
      } else {
        const uint16_t* pair = reinterpret_cast<const uint16_t*>(p) + 2 * i;
        if (token + 2 * i < end) word[i] = (word[i] & 0xffff0000u) | pair[0];
        if (token + 2 * i + 1 < end)
          word[i] = (word[i] & 0xffffu) | static_cast<uint32_t>(pair[1]) << 16;
      }
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }

  // Where a vector has fewer than kPer elements, the rest are -inf.
  __device__ __forceinline__ void unpack(uint4 raw, float (&x)[kPer]) const {
    if constexpr (sizeof(T) == 4) {
      unpack_floats<T>(raw, x);
    } else if (penalised) {
      float few[4];
      unpack_floats<float>(raw, few);
#pragma unroll
      for (int i = 0; i < kPer; ++i) x[i] = i < 4 ? few[i % 4] : -infinity();
    } else {
      unpack_floats<T>(raw, x);
    }
  }

  // How far ordered_bits of this row's elements can be shifted down without losing anything.
  __device__ __forceinline__ int spare_bits() const {
    return wide() ? 0 : std::is_same_v<T, f16> ? 13 : 16;
  }
};

// Calls f(first token, elements) over [begin, end), begin a multiple of 8, for thread `me` of
// kTeam. All of them make the same number of calls, those without a vector left with -inf. While a
// thread works on one vector, kAhead are on their way.
template <int kTeam, int kAhead, typename T, typename F>
__device__ __forceinline__ void for_vectors(const Row<T>& row, uint32_t begin, uint32_t end,
                                            uint32_t me, F f) {
  const uint32_t per = row.per_vector(), stride = per * kTeam;
  uint4 raw[kAhead];
#pragma unroll
  for (int a = 0; a < kAhead; ++a) raw[a] = row.fetch(begin + a * stride + me * per, end);
#pragma unroll 1
  for (uint32_t i = begin; i < end; i += stride) {
    float x[Row<T>::kPer];
    row.unpack(raw[0], x);
#pragma unroll
    for (int a = 0; a + 1 < kAhead; ++a) raw[a] = raw[a + 1];
    raw[kAhead - 1] = row.fetch(i + kAhead * stride + me * per, end);
    f(i + me * per, x);
  }
}

// Each block of the group over its own slice. Only the first pass over a row waits for memory; the
// others find it in the L2 cache.
template <int kAhead = 1, typename T, typename F>
__device__ __forceinline__ void for_vectors(const Group& group, const Row<T>& row, F f) {
  for_vectors<kThreads, kAhead>(row, group.begin(row.size), group.end(row.size), threadIdx.x, f);
}

// What one sequence asks for. Kept in shared memory: it would take too many registers.
struct Choice {
  float temperature, inv_temperature;
  uint32_t top_k;  // 0: off
  float top_p;     // 1: off
  float min_p;     // 0: off
  bool greedy;
  uint64_t seed;

  __device__ __forceinline__ bool filters() const {
    return !greedy && (top_k > 0 || top_p < 1.0f || min_p > 0.0f);
  }

  // By the whole block: that of sequence b, for rows of `size` columns.
  __device__ __forceinline__ void read(const SamplingParams& s, int64_t b, uint32_t size) {
    __syncthreads();  // the last one may still be in use
    if (threadIdx.x == 0) {
      const int32_t k = s.top_k[b];
      temperature = s.temperature[b];
      inv_temperature = 1.0f / temperature;
      top_k = k > 0 && static_cast<uint32_t>(k) < size ? static_cast<uint32_t>(k) : 0u;
      top_p = s.top_p[b] < 1.0f ? s.top_p[b] : 1.0f;
      min_p = s.min_p[b] > 0.0f ? s.min_p[b] : 0.0f;
      greedy = temperature < kGreedyTemperature;
      seed = static_cast<uint64_t>(s.seed[b]);
    }
    __syncthreads();
  }
};

// The largest and the smallest finite element. Not valid: nothing can be sampled from this row.
struct Extent {
  bool valid;
  float max, min;
};

template <typename T>
__device__ Extent scan(Group& group, const Row<T>& row) {
  bool bad = false;
  uint32_t most = 0, least = 0;
  float max = -infinity(), min = infinity();
  for_vectors(group, row, [&](uint32_t, const float (&x)[Row<T>::kPer]) {
#pragma unroll
    for (int i = 0; i < Row<T>::kPer; ++i) {
      bad |= !(x[i] < infinity());
      max = fmaxf(max, x[i]);
      min = x[i] > -infinity() ? fminf(min, x[i]) : min;
    }
  });
  if (max > -infinity()) {
    most = ordered_bits(max);
    least = ~ordered_bits(min);
  }
  most = __reduce_max_sync(kAllLanes, most);
  least = __reduce_max_sync(kAllLanes, least);
  bad = __any_sync(kAllLanes, bad) != 0;
  if (lane_index() == 0) {
    atomicMax(&group.shared.mine.max, most);
    atomicMax(&group.shared.mine.min, least);
    if (bad) atomicOr(&group.shared.mine.bad, 1u);
  }
  const Board& seen = group.meet();
  return Extent{seen.bad == 0 && seen.max != 0, from_ordered(seen.max), from_ordered(~seen.min)};
}

}  // namespace inferlab::cuda
