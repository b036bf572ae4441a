// The one noise: Philox4x32-10 keyed by a request's seed and counted by absolute position, so that
// the randomness of a token depends on nothing else (Salmon et al., "Parallel random numbers: as
// easy as 1, 2, 3", 2011). Compiled by every backend; all arithmetic is integer or explicit fp32
// fma, so the bits are the same everywhere.
//
//   key     = seed (low word, high word)
//   counter = (position, token / 4, purpose, 0); word token % 4 of the block belongs to the token
#pragma once

#include "inferlab/portable.h"
#include "inferlab/status.h"

namespace inferlab {

// What a draw is for. Draws for different purposes are independent.
enum Purpose : uint32_t {
  kPurposeToken = 0,     // the target's choice at a position; drafters share it on purpose
  kPurposeDraft = 1,     // draft draws under the `rejection` policy
  kPurposeAccept = 2,    // acceptance uniforms under `rejection`; "token" is the child's node index
  kPurposeRecovery = 3,  // draws from the residual under `rejection`
};

struct PhiloxBlock {
  uint32_t w[4];
};

inline namespace INFERLAB_INLINE_NAMESPACE {

INFERLAB_HD inline PhiloxBlock philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                             uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return PhiloxBlock{{c0, c1, c2, c3}};
}

INFERLAB_HD inline uint32_t noise_word(uint64_t seed, uint32_t position, uint32_t token,
                                       uint32_t purpose) {
  const PhiloxBlock b =
      philox4x32_10(position, token >> 2, purpose, 0u, static_cast<uint32_t>(seed),
                    static_cast<uint32_t>(seed >> 32));
  const uint32_t low = token & 1u ? b.w[1] : b.w[0];  // an index would put b into memory on GPUs
  const uint32_t high = token & 1u ? b.w[3] : b.w[2];
  return token & 2u ? high : low;
}

INFERLAB_HD inline float noise_fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__METAL_VERSION__)
  return metal::fma(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

INFERLAB_HD inline float noise_from_bits(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#elif defined(__METAL_VERSION__)
  return as_type<float>(u);
#else
  float f;
  std::memcpy(&f, &u, 4);
  return f;
#endif
}

INFERLAB_HD inline uint32_t noise_to_bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#elif defined(__METAL_VERSION__)
  return as_type<uint32_t>(f);
#else
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
#endif
}

// Natural logarithm of a positive normal float; at most 1 ulp off near 1 and elsewhere about 2.
// m * 2^e with m in [sqrt(1/2), sqrt(2)), then the polynomial of Cephes logf on f = m - 1.
INFERLAB_HD inline float noise_log(float x) {
  const uint32_t bits = noise_to_bits(x);
  const uint32_t shifted = bits - 0x3f3504f3u;  // sqrt(1/2)
  const int32_t e = static_cast<int32_t>(shifted) >> 23;
  const float m = noise_from_bits((shifted & 0x007fffffu) + 0x3f3504f3u);
  const float f = m - 1.0f;
  const float fe = static_cast<float>(e);
  float p = 7.0376836292e-2f;
  p = noise_fma(p, f, -1.1514610310e-1f);
  p = noise_fma(p, f, 1.1676998740e-1f);
  p = noise_fma(p, f, -1.2420140846e-1f);
  p = noise_fma(p, f, 1.4249322787e-1f);
  p = noise_fma(p, f, -1.6668057665e-1f);
  p = noise_fma(p, f, 2.0000714765e-1f);
  p = noise_fma(p, f, -2.4999993993e-1f);
  p = noise_fma(p, f, 3.3333331174e-1f);
  const float f2 = f * f;
  float r = (p * f) * f2;
  r = noise_fma(fe, -2.12194440e-4f, r);
  r = noise_fma(f2, -0.5f, r);
  r = r + f;
  return noise_fma(fe, 0.693359375f, r);
}

// Uniform in (0, 1) on 2^23 midpoints: neither 0 nor 1 can occur.
INFERLAB_HD inline float noise_uniform(uint32_t word) {
  return (static_cast<float>(word >> 9) + 0.5f) * 1.1920928955078125e-7f;  // 2^-23
}

// Standard Gumbel, -log(-log(1 - u)) with u = (word + 1/2) / 2^32. Counting u from the top keeps
// all 32 bits where they matter, in the upper tail: the largest value is 22.9, not 16.6.
INFERLAB_HD inline float noise_gumbel(uint32_t word) {
  // float(word) rounds to nearest even on every backend; the clamp keeps u below 1.
  float u = noise_fma(static_cast<float>(word), 2.3283064365386963e-10f, 1.1641532182693481e-10f);
  const float top = 0.99999994f;  // 1 - 2^-24
  u = u < top ? u : top;
  const float w = 1.0f - u;
  const float delta = (1.0f - w) - u;  // what the rounding of w lost, exactly
  const float exponential = -(noise_log(w) + delta);
  return -noise_log(exponential);
}

INFERLAB_HD inline float gumbel(uint64_t seed, uint32_t position, uint32_t token,
                                uint32_t purpose) {
  return noise_gumbel(noise_word(seed, position, token, purpose));
}

}  // namespace INFERLAB_INLINE_NAMESPACE

// The noise of noise_word and gumbel as a device computes it, for tests.
struct PhiloxParams {
  uint32_t counter[4], key[2];
  Ptr<uint32_t> out;  // [4]
};
struct GumbelRowParams {
  uint64_t seed;
  uint32_t position, purpose;
  Ptr<float> out;  // [tokens]
  int64_t tokens;
};

#if !defined(__METAL_VERSION__)
namespace cpu {
Status gumbel_row(const GumbelRowParams& params);
}
namespace cuda {
Status philox_block(const PhiloxParams& params, void* stream);
Status gumbel_row(const GumbelRowParams& params, void* stream);
}  // namespace cuda
#endif

}  // namespace inferlab
