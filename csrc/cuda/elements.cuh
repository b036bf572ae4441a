// Elements taken 16 bytes or one at a time, by the same code: kernels have a wide twin for aligned
// rows and a narrow one for all others.
#pragma once

#include "convert.cuh"

namespace inferlab::cuda {

// How many elements a thread takes at once.
template <typename T, bool kWide>
constexpr int kStep = kWide ? kPerVector<T> : 1;

template <typename T, bool kWide>
__device__ __forceinline__ void read(const T* p, float (&out)[kStep<T, kWide>]) {
  if constexpr (kWide) {
    load_floats(p, out);
  } else {
    out[0] = load_float(*p);
  }
}

template <typename T, bool kWide>
__device__ __forceinline__ void write(T* p, const float (&in)[kStep<T, kWide>]) {
  if constexpr (kWide) {
    store_floats(p, in);
  } else {
    *p = store_float<T>(in[0]);
  }
}

// Moves elements without looking at them: their bits stay.
template <typename T, bool kWide>
__device__ __forceinline__ void copy(const T* from, T* to) {
  if constexpr (kWide) {
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  } else {
    *to = *from;
  }
}

}  // namespace inferlab::cuda
