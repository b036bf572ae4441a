// linear: y = x W^T (+ bias) (+ residual) for up to 16 rows of x, at the speed at which W is read.
// (linear_wide.cu takes more.)
// With `norm`, x is RMS-normed on its way in; with `gated`, W is a gate and an up projection one
// below the other, and y is silu(gate) * up.
//
// A block computes 32 outputs (16 gated ones) of all rows; its 8 warps share the inputs, 32 at a
// time in turns. W is the left operand of the tensor cores (two tiles of 16 outputs; gate and up),
// the rows of x are the columns of the right one (8 to a group). The order of the inputs within 32
// is free as long as both operands have the same, so that a lane takes 16 bytes of a row of W, and
// 16 of a row of x, as they lie: what it copies to shared memory (cp.async, some stages deep)
// nobody else reads, and no barrier is needed until the warps' sums are added up, in their order.
// So an output is the same sum whatever rows are beside it. Grid: one block per 32 rows of W.
//
// Bytes: out * in * s for W, read once; x is read once by each block, from the L2 cache: at 16 rows
// half of what W is. Two blocks fit an SM and keep 2 * 3 * 16 KB of W under way (2 * 2 for more
// than 8 rows); 3.0 TB/s * 0.8 us need 18 KB on each of 132. Where W is constant its first stages
// are requested before the kernels in front have ended.
#include <type_traits>

#include "convert.cuh"
#include "cp_async.cuh"
#include "inferlab/linear.h"
#include "launch.cuh"
#include "linear_wide.cuh"
#include "mma.cuh"

namespace inferlab::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTiles = 2;              // of 16 rows of W
constexpr int kChunk = 32;             // inputs that a warp takes at a time
constexpr int kRowParts = 2 * kTiles;  // a lane has rows g and g + 8 of each tile
constexpr int64_t kMaxRows = 16;

template <int kGroups>
constexpr int kStagesOf = kGroups == 1 ? 4 : 3;  // 99 KB are what sm_86, 89 and 120 have

template <int kGroups>
struct alignas(16) Shared {
  static constexpr int kStages = kStagesOf<kGroups>;
  uint4 weight[kStages][kRowParts][kThreads];
  uint4 x[kStages][kGroups][kThreads];
  float sums[kWarps][kTiles * kGroups][4][32];
  float squares[8 * kGroups][kWarps];
};

// Where row 8 * part + g of a block's rows lies in W; behind the last one: -1.
template <bool kGated>
__device__ __forceinline__ int64_t weight_row(const LinearParams& p, int part, int g) {
  if constexpr (kGated) {
    const int64_t output = int64_t{16} * blockIdx.x + 8 * (part % 2) + g;
    return output < p.out ? part / 2 * p.out + output : -1;
  }
  const int64_t row = int64_t{16 * kTiles} * blockIdx.x + 8 * part + g;
  return row < p.out ? row : -1;
}

// Of a lane's chunks, which are kChunk * kWarps inputs apart.
__device__ __forceinline__ int first_input() {
  return kChunk * (threadIdx.x / 32) + 8 * (threadIdx.x % 4);
}

// Copies a lane's parts of chunks to its own places in shared memory.
template <typename T, int kGroups, bool kGated>
struct Loader {
  static constexpr int kStages = kStagesOf<kGroups>;
  Shared<kGroups>& shared;
  AsyncCopies copies;
  const void* any;             // an address that exists
  const T* weight[kRowParts];  // row, at this lane's first chunk; null behind the last output
  const T* x[kGroups];         // likewise; null behind the last row
  int chunks;                  // of this warp

  __device__ __forceinline__ Loader(Shared<kGroups>& shared_, const LinearParams& p)
      : shared(shared_), any(p.weight) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
    const int all = static_cast<int>(p.in / kChunk);
    chunks = (all - warp + kWarps - 1) / kWarps;
#pragma unroll
    for (int i = 0; i < kRowParts; ++i) {
      const int64_t row = weight_row<kGated>(p, i, g);
      weight[i] = row < 0 ? nullptr : static_cast<const T*>(p.weight) + row * p.in + first_input();
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int row = 8 * i + g;
      x[i] = row < p.rows ? static_cast<const T*>(p.x) + row * p.x_stride + first_input() : nullptr;
    }
  }

  __device__ __forceinline__ void request(uint4& to, const T* from, int chunk) {
    const bool exists = from != nullptr && chunk < chunks;
    copies.copy16(&to, exists ? from + int64_t{kChunk} * kWarps * chunk : any, exists);
  }
  __device__ __forceinline__ void request_weight(int chunk) {
#pragma unroll
    for (int i = 0; i < kRowParts; ++i) {
      request(shared.weight[chunk % kStages][i][threadIdx.x], weight[i], chunk);
    }
  }
  __device__ __forceinline__ void request_x(int chunk) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      request(shared.x[chunk % kStages][i][threadIdx.x], x[i], chunk);
    }
    copies.commit();
  }
};

struct NoNorm {
  template <typename... Ts>
  __device__ __forceinline__ explicit NoNorm(const Ts&...) {}
};

// The RMS norm of x, in chunks: what rms_norm.cu does to a row, rounded where it rounds.
template <typename T, int kGroups>
struct Norm {
  float scale[kGroups];  // of the lane's rows
  const T* weight;       // at the lane's first chunk
  uint4 ahead;           // the weight's next chunk

  // Every row is summed by all threads, in an order that does not depend on how many rows there
  // are.
  __device__ __forceinline__ Norm(Shared<kGroups>& shared, const LinearParams& p)
      : weight(static_cast<const T*>(p.norm) + first_input()) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = 0; row < p.rows; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      float sum = 0.0f;
#pragma unroll 4
      for (int64_t i = 8 * threadIdx.x; i < p.in; i += 8 * kThreads) {
        float a[8];
        load_floats(x + i, a);
#pragma unroll
        for (const float v : a) sum = __fmaf_rn(v, v, sum);
      }
#pragma unroll
      for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
      if (lane == 0) shared.squares[row][warp] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int row = 8 * i + lane / 4;
      float sum = 0.0f;
      if (row < p.rows) {
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += shared.squares[row][w];
      }
      scale[i] = 1.0f / sqrtf(sum / static_cast<float>(p.in) + p.norm_eps);
    }
  }

  __device__ __forceinline__ void fetch(int chunk) {
    ahead = *reinterpret_cast<const uint4*>(weight + int64_t{kChunk} * kWarps * chunk);
  }

  __device__ __forceinline__ void apply(uint4 (&x)[kGroups]) const {
    float w[8];
    unpack_floats<T>(ahead, w);
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      float a[8];
      unpack_floats<T>(x[i], a);
#pragma unroll
      for (int e = 0; e < 8; ++e) a[e] = round_to<T>(a[e] * scale[i]) * w[e];
      x[i] = pack_floats<T>(a);
    }
  }
};

}  // namespace

// ---- kernel -------------------------------------------------------------------------------------

template <typename T, int kGroups, bool kNorm, bool kGated>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(LinearParams p) {
  constexpr int kStages = kStagesOf<kGroups>;
  let_next_kernel_start();
  auto& shared = shared_memory<Shared<kGroups>>();
  if (!p.weight_is_constant) wait_for_earlier_kernels();
  Loader<T, kGroups, kGated> loader(shared, p);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) loader.request_weight(i);
  if (p.weight_is_constant) wait_for_earlier_kernels();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) loader.request_x(i);
  [[maybe_unused]] std::conditional_t<kNorm, Norm<T, kGroups>, NoNorm> norm(shared, p);
  if constexpr (kNorm) {
    if (loader.chunks > 0) norm.fetch(0);
  }

  float sums[kTiles][kGroups][4] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < loader.chunks; ++chunk) {
    loader.copies.template wait<kStages - 2>();
    uint4 w[kRowParts], x[kGroups];
#pragma unroll
    for (int i = 0; i < kRowParts; ++i) w[i] = shared.weight[chunk % kStages][i][threadIdx.x];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) x[i] = shared.x[chunk % kStages][i][threadIdx.x];
    loader.request_weight(chunk + kStages - 1);
    loader.request_x(chunk + kStages - 1);
    if constexpr (kNorm) {
      norm.apply(x);
      if (chunk + 1 < loader.chunks) norm.fetch(chunk + 1);
    }
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const uint4 &low = w[2 * tile], &high = w[2 * tile + 1];
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        mma<T>(sums[tile][i], {low.x, high.x, low.y, high.y}, x[i].x, x[i].y);
        mma<T>(sums[tile][i], {low.z, high.z, low.w, high.w}, x[i].z, x[i].w);
      }
    }
  }

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kTiles * kGroups; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) shared.sums[warp][i][e][lane] = sums[i / kGroups][i % kGroups][e];
  }
  __syncthreads();
  // What a lane had of a tile's element e of a group, summed over the warps, bias included.
  const auto total = [&](int tile, int group, int e, int64_t weight_row) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][tile * kGroups + group][e][lane];
    if (p.bias != nullptr) sum += load_float(static_cast<const T*>(p.bias)[weight_row]);
    return sum;
  };
  constexpr int kOutTiles = kGated ? 1 : kTiles;
#pragma unroll
  for (int value = warp; value < 4 * kGroups * kOutTiles; value += kWarps) {
    const int e = value % 4, group = value / 4 % kGroups, tile = value / 4 / kGroups;
    const int64_t output =
        int64_t{16 * kOutTiles} * blockIdx.x + 16 * tile + lane / 4 + 8 * (e / 2);
    const int64_t row = 8 * group + 2 * (lane % 4) + e % 2;
    if (output >= p.out || row >= p.rows) continue;
    const int64_t at = row * p.out + output;
    float y = total(tile, group, e, output);
    if constexpr (kGated) {
      const float gate = round_to<T>(y), up = round_to<T>(total(1, group, e, p.out + output));
      y = round_to<T>(gate / (1.0f + expf(-gate))) * up;
    } else if (p.residual != nullptr) {
      y = round_to<T>(y) + load_float(static_cast<const T*>(p.residual)[at]);
    }
    static_cast<T*>(p.y)[at] = store_float<T>(y);
  }
}

// ---- launcher -----------------------------------------------------------------------------------

namespace {

template <typename T, int kGroups>
Status launch_groups(const LinearParams& p, void* stream) {
  const auto kernel = p.norm != nullptr ? p.gated ? linear_kernel<T, kGroups, true, true>
                                                  : linear_kernel<T, kGroups, true, false>
                      : p.gated         ? linear_kernel<T, kGroups, false, true>
                                        : linear_kernel<T, kGroups, false, false>;
  const int64_t outputs = p.gated ? 16 : 16 * kTiles;
  const int64_t blocks = (p.out + outputs - 1) / outputs;
  if (blocks > 0x7fffffff) return Status::kBadArgument;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                sizeof(Shared<kGroups>), stream, p, Blocks::kIndependent, Start::kEarly);
}

template <typename T>
Status launch_linear(const LinearParams& p, void* stream) {
  return p.rows <= 8 ? launch_groups<T, 1>(p, stream) : launch_groups<T, 2>(p, stream);
}

}  // namespace

bool can_linear(const LinearParams& p) {
  if (p.rows > kMaxRows) return can_linear_wide(p);
  const int64_t size = 2;
  return p.dtype != DType::kF32 && p.in >= kChunk && p.in % kChunk == 0 &&
         all_multiples_of_16(p.x, p.weight, p.norm, p.x_stride * size);
}

int64_t linear_workspace_bytes(const LinearParams& p) {
  return p.rows > kMaxRows && can_linear(p) ? linear_wide_workspace_bytes(p) : 0;
}

Status linear(const LinearParams& p, void* workspace, void* stream) {
  if (p.rows == 0 || p.out == 0) return Status::kOk;
  if (!can_linear(p)) return Status::kBadArgument;
  if (p.rows > kMaxRows) return linear_wide(p, workspace, stream);
  return p.dtype == DType::kF16 ? launch_linear<f16>(p, stream) : launch_linear<bf16>(p, stream);
}

}  // namespace inferlab::cuda
