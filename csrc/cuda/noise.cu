// The noise of inferlab/noise.h as this device computes it: what tests compare with the known
// answers and with the other backends. One thread per Philox block of four tokens; 4 bytes written
// per token.
#include "inferlab/noise.h"

#include "launch.cuh"

namespace inferlab::cuda {
namespace {

constexpr int kThreads = 256;

}  // namespace

// ---- kernels ------------------------------------------------------------------------------------

__global__ void __launch_bounds__(1) philox_kernel(PhiloxParams p) {
  const PhiloxBlock block =
      philox4x32_10(p.counter[0], p.counter[1], p.counter[2], p.counter[3], p.key[0], p.key[1]);
  for (int i = 0; i < 4; ++i) p.out[i] = block.w[i];
}

__global__ void __launch_bounds__(kThreads) gumbel_kernel(GumbelRowParams p) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (first >= p.tokens) return;
  const PhiloxBlock block =
      philox4x32_10(p.position, static_cast<uint32_t>(first >> 2), p.purpose, 0u,
                    static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i < p.tokens) p.out[first + i] = noise_gumbel(block.w[i]);
  }
}

// ---- launchers ----------------------------------------------------------------------------------

Status philox_block(const PhiloxParams& p, void* stream) {
  return launch(philox_kernel, dim3(1), dim3(1), 0, stream, p);
}

Status gumbel_row(const GumbelRowParams& p, void* stream) {
  const int64_t blocks = (p.tokens + 4 * kThreads - 1) / (4 * kThreads);
  return launch(gumbel_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, p);
}

}  // namespace inferlab::cuda
