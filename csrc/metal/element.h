// The element type of a library (INFERLAB_ELEMENT: 0 f32, 1 f16, 2 bf16) and its conversions.
// bf16 is handled as bits, which needs no language version that has it.
#pragma once

#include "inferlab/portable.h"

using namespace metal;

inline float to_float(float x) { return x; }

#if INFERLAB_ELEMENT == 0
typedef float Element;
inline Element to_element(float x) { return x; }
#elif INFERLAB_ELEMENT == 1
typedef half Element;
inline float to_float(half x) { return float(x); }
inline Element to_element(float x) { return half(x); }
#elif INFERLAB_ELEMENT == 2
typedef ushort Element;
inline float to_float(ushort x) { return as_type<float>(uint(x) << 16); }
// To nearest, ties to even; NaN stays NaN.
inline Element to_element(float x) {
  const uint u = as_type<uint>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return ushort((u >> 16) | 0x40u);
  return ushort((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
#else
#error "INFERLAB_ELEMENT must be 0 (f32), 1 (f16) or 2 (bf16)"
#endif

// What storing an intermediate result does to it.
inline float rounded(float x) { return to_float(to_element(x)); }
