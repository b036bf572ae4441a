// silu_mul: out = silu(gate) * up, where a row of x is gate then up.
//
// One thread per 16 bytes of out (per element where rows are not multiples of 16 bytes); grid.x
// over a row, grid.y over rows. Bytes: rows * 2 * dim * s read, rows * dim * s written.
#include "elements.cuh"
#include "inferlab/layer.h"
#include "launch.cuh"
#include "pages.cuh"

namespace inferlab::cuda {
namespace {

constexpr int kThreads = 128;

}  // namespace

// ---- kernel -------------------------------------------------------------------------------------

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) silu_mul_kernel(SiluMulParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  constexpr int kElements = kStep<T, kWide>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kElements;
  if (i >= p.dim) return;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const T* x = static_cast<const T*>(p.x) + row * 2 * p.dim + i;
    float gate[kElements], up[kElements];
    read<T, kWide>(x, gate);
    read<T, kWide>(x + p.dim, up);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      gate[e] = round_to<T>(gate[e] / (1.0f + expf(-gate[e]))) * up[e];
    }
    write<T, kWide>(static_cast<T*>(p.out) + row * p.dim + i, gate);
  }
}

// ---- launcher -----------------------------------------------------------------------------------

template <typename T, bool kWide>
Status launch_silu_mul(const SiluMulParams& p, void* stream) {
  const int64_t per_block = kThreads * kStep<T, kWide>;
  const int64_t spans = (p.dim + per_block - 1) / per_block;
  if (spans > kMaxGridX) return Status::kBadArgument;
  const dim3 grid(static_cast<unsigned>(spans),
                  static_cast<unsigned>(p.rows < kMaxGridYZ ? p.rows : kMaxGridYZ));
  return launch(silu_mul_kernel<T, kWide>, grid, dim3(kThreads), 0, stream, p, Blocks::kIndependent,
                Start::kEarly);
}

Status silu_mul(const SiluMulParams& p, void* stream) {
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool wide = all_multiples_of_16(p.x, p.out, p.dim * static_cast<int64_t>(sizeof(T)));
    return wide ? launch_silu_mul<T, true>(p, stream) : launch_silu_mul<T, false>(p, stream);
  });
}

}  // namespace inferlab::cuda
