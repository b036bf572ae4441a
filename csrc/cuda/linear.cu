// linear: y = x W^T (+ bias) (+ residual) for up to 16 rows of x, at the speed at which W is read.
//
// A block computes 32 outputs of all rows; its 8 warps share the inputs, 32 at a time in turns. W
// is the left operand of the tensor cores (two tiles of 16 outputs), the rows of x are the columns
// of the right one (8 to a group). The order of the inputs within 32 is free as long as both
// operands have the same, so that a lane takes 16 bytes of a row of W, and 16 of a row of x, as
// they lie: what it copies to shared memory (cp.async, some stages deep) nobody else reads, and no
// barrier is needed until the warps' sums are added up, in their order. So an output is the same
// sum whatever rows are beside it. Grid: out / 32 blocks.
//
// Bytes: out * in * s for W, read once; x is read once by each block, from the L2 cache: at 16 rows
// half of what W is. Two blocks fit an SM and keep 2 * 3 * 16 KB of W under way (2 * 2 for more
// than 8 rows); 3.0 TB/s * 0.8 us need 18 KB on each of 132. Where W is constant its first stages
// are requested before the kernels in front have ended, which hides much of what those wait for.
#include "convert.cuh"
#include "cp_async.cuh"
#include "inferlab/linear.h"
#include "launch.cuh"
#include "mma.cuh"

namespace inferlab::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTiles = 2;              // of 16 outputs
constexpr int kOutputs = 16 * kTiles;  // of a block
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
};

// Copies a lane's parts of chunks to its own places in shared memory.
template <typename T, int kGroups>
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
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int64_t first = kChunk * warp + 8 * t;
    const int all = static_cast<int>(p.in / kChunk);
    chunks = (all - warp + kWarps - 1) / kWarps;
#pragma unroll
    for (int i = 0; i < kRowParts; ++i) {
      const int64_t row = int64_t{kOutputs} * blockIdx.x + 8 * i + g;
      weight[i] = row < p.out ? static_cast<const T*>(p.weight) + row * p.in + first : nullptr;
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int row = 8 * i + g;
      x[i] = row < p.rows ? static_cast<const T*>(p.x) + row * p.x_stride + first : nullptr;
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

}  // namespace

// ---- kernel -------------------------------------------------------------------------------------

template <typename T, int kGroups>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(LinearParams p) {
  constexpr int kStages = kStagesOf<kGroups>;
  let_next_kernel_start();
  auto& shared = shared_memory<Shared<kGroups>>();
  if (!p.weight_is_constant) wait_for_earlier_kernels();
  Loader<T, kGroups> loader(shared, p);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) loader.request_weight(i);
  if (p.weight_is_constant) wait_for_earlier_kernels();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) loader.request_x(i);

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
  // A warp adds up what a lane of it wrote, of blocks `i` of 16 outputs x 8 rows.
  constexpr int kValues = kTiles * kGroups * 4;
#pragma unroll
  for (int value = warp; value < kValues; value += kWarps) {
    const int i = value / 4, e = value % 4;
    const int64_t output =
        int64_t{kOutputs} * blockIdx.x + 16 * (i / kGroups) + lane / 4 + 8 * (e / 2);
    const int64_t row = 8 * (i % kGroups) + 2 * (lane % 4) + e % 2;
    if (output >= p.out || row >= p.rows) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][i][e][lane];
    if (p.bias != nullptr) sum += load_float(static_cast<const T*>(p.bias)[output]);
    const int64_t at = row * p.out + output;
    if (p.residual != nullptr) {
      sum = round_to<T>(sum) + load_float(static_cast<const T*>(p.residual)[at]);
    }
    static_cast<T*>(p.y)[at] = store_float<T>(sum);
  }
}

// ---- launcher -----------------------------------------------------------------------------------

namespace {

template <typename T>
Status launch_linear(const LinearParams& p, void* stream) {
  const int64_t blocks = (p.out + kOutputs - 1) / kOutputs;
  if (blocks > 0x7fffffff) return Status::kBadArgument;
  const dim3 grid(static_cast<unsigned>(blocks));
  if (p.rows <= 8) {
    return launch(linear_kernel<T, 1>, grid, dim3(kThreads), sizeof(Shared<1>), stream, p,
                  Blocks::kIndependent, Start::kEarly);
  }
  return launch(linear_kernel<T, 2>, grid, dim3(kThreads), sizeof(Shared<2>), stream, p,
                Blocks::kIndependent, Start::kEarly);
}

}  // namespace

bool can_linear(const LinearParams& p) {
  const int64_t size = 2;
  return p.dtype != DType::kF32 && p.rows <= kMaxRows && p.in >= kChunk && p.in % kChunk == 0 &&
         all_multiples_of_16(p.x, p.weight, p.x_stride * size);
}

Status linear(const LinearParams& p, void* stream) {
  if (p.rows == 0 || p.out == 0) return Status::kOk;
  if (!can_linear(p)) return Status::kBadArgument;
  return p.dtype == DType::kF16 ? launch_linear<f16>(p, stream) : launch_linear<bf16>(p, stream);
}

}  // namespace inferlab::cuda
