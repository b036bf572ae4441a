// rms_norm: out = weight * (x / sqrt(mean(x^2) + eps)), row by row.
//
// A row belongs to kWarps warps of a block of 8: one for short rows (the heads of q and k), all
// eight for long ones (the hidden state); grid.x over groups of rows. Each thread sums its squares
// in fp32, the row's threads add them up, and each reads its elements again, from the first-level
// cache, to scale them. So out may be x. 16 bytes are moved at a time where all addresses are
// multiples of 16, else one element. Bytes: rows * dim * s read and as many written.
#include "elements.cuh"
#include "inferlab/layer.h"
#include "launch.cuh"

namespace inferlab::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockWarps = kThreads / 32;
constexpr int64_t kLongRow = 1024;  // elements; from here on a block shares a row

struct Shared {
  float sum[kBlockWarps];
};

__device__ float warp_sum(float x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  return x;
}

}  // namespace

// ---- kernel -------------------------------------------------------------------------------------

template <typename T, bool kWide, int kWarps>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  constexpr int kRowThreads = 32 * kWarps, kStride = kRowThreads * kStep<T, kWide>;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kBlockWarps / kWarps) + threadIdx.x / kRowThreads;
  if (kWarps < kBlockWarps && row >= p.rows) return;  // whole warps: nobody waits for them
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  const int64_t first = threadIdx.x % kRowThreads * kStep<T, kWide>;

  float sum = 0.0f;
  for (int64_t i = first; i < p.dim; i += kStride) {
    float a[kStep<T, kWide>];
    read<T, kWide>(x + i, a);
#pragma unroll
    for (const float v : a) sum = __fmaf_rn(v, v, sum);
  }
  sum = warp_sum(sum);
  if constexpr (kWarps > 1) {
    Shared& shared = shared_memory<Shared>();
    if (threadIdx.x % 32 == 0) shared.sum[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.sum[w];
  }

  const float scale = 1.0f / sqrtf(sum / static_cast<float>(p.dim) + p.eps);
  for (int64_t i = first; i < p.dim; i += kStride) {
    float a[kStep<T, kWide>], w[kStep<T, kWide>];
    read<T, kWide>(x + i, a);
    read<T, kWide>(weight + i, w);
#pragma unroll
    for (int e = 0; e < kStep<T, kWide>; ++e) {
      const float normed = a[e] * scale;
      a[e] = (p.offset != 0.0f ? normed : round_to<T>(normed)) * (w[e] + p.offset);
    }
    write<T, kWide>(out + i, a);
  }
}

// ---- launcher -----------------------------------------------------------------------------------

template <typename T, bool kWide>
Status launch_rms_norm(const RmsNormParams& p, void* stream) {
  const bool long_rows = p.dim >= kLongRow;
  const int64_t rows_per_block = long_rows ? 1 : kBlockWarps;
  const int64_t blocks = (p.rows + rows_per_block - 1) / rows_per_block;
  if (blocks > 0x7fffffff) return Status::kBadArgument;
  const auto kernel =
      long_rows ? rms_norm_kernel<T, kWide, kBlockWarps> : rms_norm_kernel<T, kWide, 1>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), sizeof(Shared), stream,
                p, Blocks::kIndependent, Start::kEarly);
}

Status rms_norm(const RmsNormParams& p, void* stream) {
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t size = sizeof(T);
    const bool wide = all_multiples_of_16(p.x, p.weight, p.out, p.dim * size, p.x_stride * size,
                                          p.out_stride * size);
    return wide ? launch_rms_norm<T, true>(p, stream) : launch_rms_norm<T, false>(p, stream);
  });
}

}  // namespace inferlab::cuda
