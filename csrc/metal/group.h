// The threads of a threadgroup: how many, what they share, reductions. Reductions are trees of
// exchanges in a fixed order, so that sums of floats are the same bits in every run.
#pragma once

#include "inferlab/metal_launch.h"

using namespace metal;
using namespace inferlab;

constant constexpr uint kSimd = kMetalSimd;

// A threadgroup's memory is one struct, declared once in the kernel by this macro.
#if !defined(INFERLAB_SHARED)
#define INFERLAB_SHARED(Type, name) threadgroup Type name
#endif

inline void group_barrier() { threadgroup_barrier(mem_flags::mem_threadgroup); }

// Also orders what the threadgroup wrote to buffers.
inline void device_barrier() {
  threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);
}

inline ulong shuffle_xor(ulong x, ushort mask) {
  return as_type<ulong>(simd_shuffle_xor(as_type<uint2>(x), mask));
}
inline uint shuffle_xor(uint x, ushort mask) { return simd_shuffle_xor(x, mask); }
inline float shuffle_xor(float x, ushort mask) { return simd_shuffle_xor(x, mask); }

inline ulong shuffle(ulong x, ushort lane) {
  return as_type<ulong>(simd_shuffle(as_type<uint2>(x), lane));
}

struct Add {
  template <typename T>
  static T of(T a, T b) {
    return a + b;
  }
};
struct Max {
  template <typename T>
  static T of(T a, T b) {
    return a > b ? a : b;
  }
};

template <typename Op, typename T>
inline T simd_reduce(T x) {
  for (ushort mask = kSimd / 2; mask > 0; mask /= 2) x = Op::of(x, shuffle_xor(x, mask));
  return x;
}

// Over all threads of a group of kThreads; all of them call it and get the result. `parts` has an
// entry per simdgroup.
template <typename Op, uint kThreads, typename T>
inline T group_reduce(T x, threadgroup T* parts, uint tid) {
  x = simd_reduce<Op>(x);
  group_barrier();  // parts may still be read from the last time
  if (tid % kSimd == 0) parts[tid / kSimd] = x;
  group_barrier();
  x = parts[0];
  for (uint i = 1; i < kThreads / kSimd; ++i) x = Op::of(x, parts[i]);
  return x;
}
