// What lets one header be compiled as C++, CUDA and Metal: the standard includes of each, and the
// keywords that they spell differently.
#pragma once

#if defined(__METAL_VERSION__)
#include <metal_stdlib>
// a * b + c is two roundings wherever it is not written as an fma, as on the other backends.
#pragma METAL fp contract(off)
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#endif

// A constant at namespace scope; Metal keeps them in an address space of their own.
#if defined(__METAL_VERSION__)
#define INFERLAB_CONSTANT constant constexpr
#else
#define INFERLAB_CONSTANT constexpr
#endif

// An op's parameters are one struct on every backend. Metal binds memory apart from them: there a
// pointer is eight bytes that say no more than whether it is null, and a double, of which Metal has
// none, eight bytes that say nothing.
namespace inferlab {
#if defined(__METAL_VERSION__)
template <typename T>
using Ptr = uint64_t;
typedef uint64_t Double;
#else
template <typename T>
using Ptr = T*;
typedef double Double;
#endif
}  // namespace inferlab

#if defined(__CUDACC__)
#define INFERLAB_HD __host__ __device__
#else
#define INFERLAB_HD
#endif

// Inline functions of headers that both baseline and per-instruction-set files include live in a
// namespace of the file's instruction set: otherwise the linker might keep an AVX-512 copy for all.
#if defined(INFERLAB_ISA)
#define INFERLAB_INLINE_NAMESPACE INFERLAB_ISA
#else
#define INFERLAB_INLINE_NAMESPACE baseline
#endif
