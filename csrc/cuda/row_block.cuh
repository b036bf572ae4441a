// What the threads of one block do together over a row: sums, searches, sorting.
#pragma once

#include "launch.cuh"

namespace inferlab::cuda {

constexpr int kThreads = 512;  // of every kernel that reads rows
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / 32); }

// CUDA's 64-bit atomics are those of `unsigned long long`.
__device__ __forceinline__ void atomic_max(uint64_t* p, uint64_t v) {
  atomicMax(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}
__device__ __forceinline__ void atomic_add(uint64_t* p, uint64_t v) {
  atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(v));
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t v) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(kAllLanes, v, d);
  return v;
}

__device__ __forceinline__ uint64_t warp_max(uint64_t v) {
  const uint32_t high = static_cast<uint32_t>(v >> 32);
  const uint32_t most = __reduce_max_sync(kAllLanes, high);
  const uint32_t low = high == most ? static_cast<uint32_t>(v) : 0u;
  return static_cast<uint64_t>(most) << 32 | __reduce_max_sync(kAllLanes, low);
}

// `values` is shared and may be used again at once.
__device__ __forceinline__ uint64_t block_max(uint64_t v, uint64_t (&values)[kWarps]) {
  v = warp_max(v);
  if (lane_index() == 0) values[warp_index()] = v;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) v = values[w] > v ? values[w] : v;
  __syncthreads();
  return v;
}

// Sum over this thread and those before it. `sums` is shared and may be used again at once.
__device__ __forceinline__ uint64_t block_prefix_sum(uint64_t v, uint64_t (&sums)[kWarps]) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const uint64_t below = __shfl_up_sync(kAllLanes, v, d);
    if (lane_index() >= d) v += below;
  }
  if (lane_index() == 31) sums[warp_index()] = v;
  __syncthreads();
  for (int w = 0; w < warp_index(); ++w) v += sums[w];
  __syncthreads();
  return v;
}

// The smallest n in [low, high] for which reaches(n); where it is true it stays true, and at `high`
// it is taken to be. The lanes of a warp try 32 at a time.
template <typename F>
__device__ __forceinline__ uint32_t first_where(uint32_t low, uint32_t high, F reaches) {
  while (low < high) {
    const uint32_t step = (high - low) / 32 + 1;
    const uint64_t at = low + static_cast<uint64_t>(step) * static_cast<unsigned>(lane_index());
    const bool yes = at >= high || reaches(static_cast<uint32_t>(at));
    const unsigned found = __ballot_sync(kAllLanes, yes);
    const uint32_t first =
        found == 0 ? 32u : static_cast<uint32_t>(__ffs(static_cast<int>(found))) - 1;
    if (first < 32 && low + static_cast<uint64_t>(step) * first < high) high = low + step * first;
    if (first > 0) low += step * (first - 1) + 1;
  }
  return high;
}

// Sorts n shared keys, ascending. There is room up to the next power of two, at most 2 * kThreads.
__device__ inline void block_sort(uint64_t* keys, int n) {
  int padded = 1;
  while (padded < n) padded *= 2;
  for (int i = n + static_cast<int>(threadIdx.x); i < padded; i += kThreads) keys[i] = ~uint64_t{0};
  __syncthreads();
  for (int size = 2; size <= padded; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const int t = static_cast<int>(threadIdx.x);
      if (t < padded / 2) {
        const int i = 2 * t - (t & (stride - 1)), j = i + stride;
        const uint64_t a = keys[i], b = keys[j];
        if ((a > b) == ((i & size) == 0)) {
          keys[i] = b;
          keys[j] = a;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace inferlab::cuda
