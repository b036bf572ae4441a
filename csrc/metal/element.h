// The element type of a library (INFERLAB_ELEMENT, a DType) and its conversions. bf16 is handled as
// bits, which needs no language version that has it.
#pragma once

#include "inferlab/dtype.h"

using namespace metal;
using namespace inferlab;

inline float to_float(float x) { return x; }
inline float to_float(half x) { return float(x); }
inline float to_float(ushort x) { return as_type<float>(uint(x) << 16); }

template <DType type>
struct ElementOf;
template <>
struct ElementOf<DType::kF32> {
  typedef float Type;
  static float from(float x) { return x; }
};
template <>
struct ElementOf<DType::kF16> {
  typedef half Type;
  static half from(float x) { return half(x); }
};
template <>
struct ElementOf<DType::kBF16> {
  typedef ushort Type;
  // To nearest, ties to even; NaN stays NaN.
  static ushort from(float x) {
    const uint u = as_type<uint>(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return ushort((u >> 16) | 0x40u);
    return ushort((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
};

constant constexpr DType kElement = DType(INFERLAB_ELEMENT);
typedef ElementOf<kElement>::Type Element;

inline Element to_element(float x) { return ElementOf<kElement>::from(x); }

// What storing an intermediate result does to it.
inline float rounded(float x) { return to_float(to_element(x)); }
