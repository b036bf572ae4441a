// The part of CUDA that csrc/cuda uses, on the CPU: keywords, built-in variables, intrinsics and
// the runtime calls, over the fibres of simt.h. Found in place of NVIDIA's header when a .cu file
// is compiled by g++ with this folder in front; INFERLAB_CUDA_SHIM is then defined.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simt.h"

#define INFERLAB_CUDA_SHIM 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define __align__(n) alignas(n)

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx (::simt::self->thread)
#define blockIdx (::simt::self->block)
#define blockDim (::simt::self->block_dim)
#define gridDim (::simt::self->grid_dim)
constexpr int warpSize = 32;

// ---- barriers and fences ------------------------------------------------------------------------

using simt::Site;
inline void __syncthreads(Site site = Site::here()) { simt::block_barrier(0, site); }
inline int __syncthreads_count(int p, Site site = Site::here()) {
  return simt::block_barrier(p, site);
}
inline int __syncthreads_or(int p, Site site = Site::here()) {
  return simt::block_barrier(p, site) > 0;
}
inline int __syncthreads_and(int p, Site site = Site::here()) {
  return simt::block_barrier(!p, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::warp_barrier(mask); }
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() { simt::fence_block(); }
inline void __nanosleep(unsigned, Site site = Site::here()) { simt::yield(site); }

// ---- warp exchanges -----------------------------------------------------------------------------

namespace simt {

template <typename T>
uint64_t pack(T v) {
  static_assert(sizeof(T) <= 8, "a warp exchanges at most 8 bytes a lane");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  return bits;
}
template <typename T>
T unpack(uint64_t bits) {
  T v;
  std::memcpy(&v, &bits, sizeof(T));
  return v;
}
template <typename T>
T from_lane(unsigned mask, T v, unsigned lane, unsigned segment_lane_ok) {
  const uint64_t* all = warp_exchange(mask, pack(v));
  if (!segment_lane_ok) return v;
  return (mask >> lane & 1u) ? unpack<T>(all[lane]) : unpack<T>(0xffffffffffffffffu);
}
template <typename T, typename F>
T reduce(unsigned mask, T v, F f) {
  const uint64_t* all = warp_exchange(mask, pack(v));
  bool first = true;
  T r = v;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (!(mask >> i & 1u)) continue;
    r = first ? unpack<T>(all[i]) : f(r, unpack<T>(all[i]));
    first = false;
  }
  return r;
}

}  // namespace simt

template <typename T>
T __shfl_sync(unsigned mask, T v, int lane, int width = 32) {
  const unsigned base = simt::self->lane & ~(static_cast<unsigned>(width) - 1);
  return simt::from_lane(mask, v, base + (static_cast<unsigned>(lane) & (width - 1)), 1);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32) {
  const unsigned lane = simt::self->lane ^ static_cast<unsigned>(bits);
  const unsigned end = (simt::self->lane & ~(static_cast<unsigned>(width) - 1)) + width;
  return simt::from_lane(mask, v, lane, lane < end);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const unsigned lane = simt::self->lane + delta;
  const unsigned end = (simt::self->lane & ~(static_cast<unsigned>(width) - 1)) + width;
  return simt::from_lane(mask, v, lane, lane < end);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
  const unsigned base = simt::self->lane & ~(static_cast<unsigned>(width) - 1);
  return simt::from_lane(mask, v, simt::self->lane - delta, simt::self->lane >= base + delta);
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  const uint64_t* all = simt::warp_exchange(mask, p != 0);
  unsigned r = 0;
  for (unsigned i = 0; i < 32; ++i) r |= (mask >> i & 1u) && all[i] ? 1u << i : 0u;
  return r;
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == mask; }
template <typename T>
unsigned __match_any_sync(unsigned mask, T v) {
  const uint64_t* all = simt::warp_exchange(mask, simt::pack(v));
  unsigned r = 0;
  for (unsigned i = 0; i < 32; ++i) {
    r |= (mask >> i & 1u) && all[i] == simt::pack(v) ? 1u << i : 0u;
  }
  return r;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned v) {
  return simt::reduce(mask, v, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  return simt::reduce(mask, v, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) {
  return simt::reduce(mask, v, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) {
  return simt::reduce(mask, v, [](unsigned a, unsigned b) { return a | b; });
}

// ---- atomics: relaxed, as on the device ---------------------------------------------------------

template <typename T, typename F>
T simt_update(T* p, F f) {
  simt::observe();
  T old, next;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    next = f(old);
  } while (!__atomic_compare_exchange(p, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}
template <typename T, typename U>
T atomicAdd(T* p, U v) {
  return simt_update(p, [v](T old) { return static_cast<T>(old + static_cast<T>(v)); });
}
template <typename T, typename U>
T atomicSub(T* p, U v) {
  return simt_update(p, [v](T old) { return static_cast<T>(old - static_cast<T>(v)); });
}
template <typename T, typename U>
T atomicOr(T* p, U v) {
  return simt_update(p, [v](T old) { return old | static_cast<T>(v); });
}
template <typename T, typename U>
T atomicAnd(T* p, U v) {
  return simt_update(p, [v](T old) { return old & static_cast<T>(v); });
}
template <typename T, typename U>
T atomicMax(T* p, U v) {
  return simt_update(p, [v](T old) { return std::max(old, static_cast<T>(v)); });
}
template <typename T, typename U>
T atomicMin(T* p, U v) {
  return simt_update(p, [v](T old) { return std::min(old, static_cast<T>(v)); });
}
template <typename T, typename U>
T atomicExch(T* p, U v) {
  return simt_update(p, [v](T) { return static_cast<T>(v); });
}
template <typename T, typename U, typename V>
T atomicCAS(T* p, U expected, V v) {
  return simt_update(p, [expected, v](T old) {
    return old == static_cast<T>(expected) ? static_cast<T>(v) : old;
  });
}
// Counts up to `last`, then from 0 again.
inline unsigned atomicInc(unsigned* p, unsigned last) {
  return simt_update(p, [last](unsigned old) { return old >= last ? 0 : old + 1; });
}

// ---- arithmetic ---------------------------------------------------------------------------------

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float f) { return simt::unpack<unsigned>(simt::pack(f)); }
inline float __uint_as_float(unsigned u) { return simt::unpack<float>(u); }
inline int __float_as_int(float f) { return simt::unpack<int>(simt::pack(f)); }
inline float __int_as_float(int i) { return simt::unpack<float>(static_cast<unsigned>(i)); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) {
  return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v));
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
// Cache hints: streaming and L2-only loads and stores.
template <typename T>
T __ldcs(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
template <typename T>
void __stcs(T* p, T v) {
  *p = v;
}
template <typename T>
void __stcg(T* p, T v) {
  *p = v;
}

// ---- the runtime --------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? simt::last_error()
                                         : "an error that the shim never makes";
}
inline cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? static_cast<int>(simt::kMultiprocessors)
                                                       : static_cast<int>(simt::kMaxSharedBytes);
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
