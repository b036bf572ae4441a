// linear for 17 to 64 rows of x: y = x W^T (+ bias) (+ residual), or silu(gate) * up.
//
// As in linear.cu W is the left operand of the tensor cores, each lane copies the 16-byte pieces of
// W that it will use to places of its own, and the order of the inputs within 32 is free. With so
// many rows x is no longer small beside what a block reads of W: the 8 warps have 16 rows of W each
// (gated: 8 of the gate, the same 8 of up), so that 128 rows of W share one copy of x, staged by
// all threads. Where W has too few rows to occupy the device the inputs are cut into parts, whose
// sums go to the workspace in fp32 and are added up, in order, by a second kernel.
//
// Grid: x over 128 rows of W, y over parts. Bytes: out * in * s for W, read once; x is read once by
// each block, from the L2 cache: at 64 rows half of what W is. Of the ~1200 cycles in which memory
// brings 16 KB of W to one of 132 SMs, 64 rows take 256 mma and 96 KB of shared memory reads.
#include <type_traits>

#include "convert.cuh"
#include "cp_async.cuh"
#include "launch.cuh"
#include "linear_wide.cuh"
#include "mma.cuh"

namespace inferlab::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTileRows = 16 * kWarps;  // rows of W of a block
constexpr int kHalf = 32;               // inputs of two mma steps
constexpr int kChunk = 2 * kHalf;       // inputs of a stage
constexpr int kStages = 4;
constexpr int kMaxParts = 8;
constexpr int kMinChunks = 4;  // of a part

struct LinearWide {
  LinearParams a;
  float* sums;  // [parts, rows, out], where there are several parts
  int parts;
};

template <int kGroups>
struct alignas(16) Shared {
  uint4 weight[kStages][4][kThreads];    // by half and row (g, g + 8)
  uint4 x[kStages][2][8 * kGroups * 4];  // by half, row, and 16 bytes of it
};

template <typename T, int kGroups, bool kGated>
struct Loader {
  const LinearParams& p;
  Shared<kGroups>& shared;
  AsyncCopies copies;
  const T* weight[2];  // rows g and g + 8 of the warp at the part's first input; null: none
  const T* x;
  int chunks;

  __device__ __forceinline__ Loader(Shared<kGroups>& shared_, const LinearParams& p_, int parts)
      : p(p_), shared(shared_) {
    const int64_t all = p.in / kChunk;
    const int64_t begin = all * blockIdx.y / parts, end = all * (blockIdx.y + 1) / parts;
    chunks = static_cast<int>(end - begin);
    x = static_cast<const T*>(p.x) + kChunk * begin;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t output = kGated ? int64_t{kTileRows / 2} * blockIdx.x + 8 * warp + g
                                    : int64_t{kTileRows} * blockIdx.x + 16 * warp + 8 * i + g;
      const int64_t row = kGated ? i * p.out + output : output;
      weight[i] = output < p.out
                      ? static_cast<const T*>(p.weight) + row * p.in + kChunk * begin + 8 * t
                      : nullptr;
    }
  }

  __device__ __forceinline__ void request_weight(int chunk) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* row = weight[i % 2];
      const bool exists = row != nullptr && chunk < chunks;
      copies.copy16(&shared.weight[chunk % kStages][i][threadIdx.x],
                    exists ? row + kChunk * chunk + kHalf * (i / 2) : p.weight, exists);
    }
  }
  __device__ __forceinline__ void request_x(int chunk) {
    constexpr int kPieces = 8 * kGroups * 8;
#pragma unroll
    for (int i = threadIdx.x; i < kPieces; i += kThreads) {
      const int row = i / 8, piece = i % 8;
      const bool exists = row < p.rows && chunk < chunks;
      copies.copy16(&shared.x[chunk % kStages][piece / 4][4 * row + piece % 4],
                    exists ? x + row * p.x_stride + kChunk * chunk + 8 * piece : p.x, exists);
    }
    copies.commit();
  }
};

template <typename T>
__device__ __forceinline__ void finish(const LinearParams& p, int64_t row, int64_t output,
                                       float sum) {
  const int64_t at = row * p.out + output;
  if (p.bias != nullptr) sum += load_float(static_cast<const T*>(p.bias)[output]);
  if (p.residual != nullptr) {
    sum = round_to<T>(sum) + load_float(static_cast<const T*>(p.residual)[at]);
  }
  static_cast<T*>(p.y)[at] = store_float<T>(sum);
}

}  // namespace

// ---- kernels ------------------------------------------------------------------------------------

template <typename T, int kGroups, bool kGated>
__global__ void __launch_bounds__(kThreads, 2) linear_wide_kernel(LinearWide k) {
  const LinearParams& p = k.a;
  let_next_kernel_start();
  auto& shared = shared_memory<Shared<kGroups>>();
  if (!p.weight_is_constant) wait_for_earlier_kernels();
  Loader<T, kGroups, kGated> loader(shared, p, k.parts);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) loader.request_weight(i);
  if (p.weight_is_constant) wait_for_earlier_kernels();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) loader.request_x(i);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sums[kGroups][4] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < loader.chunks; ++chunk) {
    loader.copies.template wait<kStages - 2>();
    __syncthreads();  // x is there for all, and the stage that is filled next has been read by all
    loader.request_weight(chunk + kStages - 1);
    loader.request_x(chunk + kStages - 1);
    const int stage = chunk % kStages;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 low = shared.weight[stage][2 * half][threadIdx.x];
      const uint4 high = shared.weight[stage][2 * half + 1][threadIdx.x];
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const uint4 x = shared.x[stage][half][32 * i + lane];
        mma<T>(sums[i], {low.x, high.x, low.y, high.y}, x.x, x.y);
        mma<T>(sums[i], {low.z, high.z, low.w, high.w}, x.z, x.w);
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
#pragma unroll
    for (int e = 0; e < (kGated ? 2 : 4); ++e) {
      const int64_t row = 8 * i + 2 * (lane % 4) + e % 2;
      if (row >= p.rows) continue;
      if constexpr (kGated) {
        const int64_t output = int64_t{kTileRows / 2} * blockIdx.x + 8 * warp + lane / 4;
        if (output >= p.out) continue;
        float gate = sums[i][e], up = sums[i][e + 2];
        if (p.bias != nullptr) {
          gate += load_float(static_cast<const T*>(p.bias)[output]);
          up += load_float(static_cast<const T*>(p.bias)[p.out + output]);
        }
        gate = round_to<T>(gate);
        const float y = round_to<T>(gate / (1.0f + expf(-gate))) * round_to<T>(up);
        static_cast<T*>(p.y)[row * p.out + output] = store_float<T>(y);
      } else {
        const int64_t output = int64_t{kTileRows} * blockIdx.x + 16 * warp + lane / 4 + 8 * (e / 2);
        if (output >= p.out) continue;
        if (k.parts > 1) {
          k.sums[(blockIdx.y * p.rows + row) * p.out + output] = sums[i][e];
        } else {
          finish<T>(p, row, output, sums[i][e]);
        }
      }
    }
  }
}

// A thread adds up the parts of one output.
template <typename T>
__global__ void __launch_bounds__(kThreads) linear_parts_kernel(LinearWide k) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t output = int64_t{blockIdx.x} * kThreads + threadIdx.x, row = blockIdx.y;
  if (output >= k.a.out) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int part = 0; part < k.parts; ++part) {
    sum += k.sums[(part * k.a.rows + row) * k.a.out + output];
  }
  finish<T>(k.a, row, output, sum);
}

// ---- launcher -----------------------------------------------------------------------------------

namespace {

int64_t blocks_of(const LinearParams& p) {
  const int64_t outputs = p.gated ? kTileRows / 2 : kTileRows;
  return (p.out + outputs - 1) / outputs;
}

// Parts of the inputs: as many as it takes to give every multiprocessor a block.
int parts_of(const LinearParams& p) {
  if (p.gated) return 1;
  const int64_t blocks = blocks_of(p), chunks = p.in / kChunk;
  const int64_t wanted = (multiprocessors() + blocks - 1) / blocks;
  const int64_t most = chunks / kMinChunks < kMaxParts ? chunks / kMinChunks : kMaxParts;
  return static_cast<int>(wanted < most ? wanted : most < 1 ? 1 : most);
}

template <typename T, int kGroups>
Status launch_groups(const LinearWide& k, void* stream) {
  const auto kernel =
      k.a.gated ? linear_wide_kernel<T, kGroups, true> : linear_wide_kernel<T, kGroups, false>;
  const dim3 grid(static_cast<unsigned>(blocks_of(k.a)), static_cast<unsigned>(k.parts));
  return launch(kernel, grid, dim3(kThreads), sizeof(Shared<kGroups>), stream, k,
                Blocks::kIndependent, Start::kEarly);
}

template <typename T>
Status launch_wide(const LinearWide& k, void* stream) {
  const Status status =
      k.a.rows <= 32 ? launch_groups<T, 4>(k, stream) : launch_groups<T, 8>(k, stream);
  if (status != Status::kOk || k.parts == 1) return status;
  const dim3 grid(static_cast<unsigned>((k.a.out + kThreads - 1) / kThreads),
                  static_cast<unsigned>(k.a.rows));
  return launch(linear_parts_kernel<T>, grid, dim3(kThreads), 0, stream, k, Blocks::kIndependent,
                Start::kEarly);
}

}  // namespace

bool can_linear_wide(const LinearParams& p) {
  const int64_t size = 2;
  return p.dtype != DType::kF32 && p.rows <= kMaxWideRows && p.in >= kChunk && p.in % kChunk == 0 &&
         p.norm == nullptr && blocks_of(p) <= 0x7fffffff &&
         all_multiples_of_16(p.x, p.weight, p.x_stride * size);
}

int64_t linear_wide_workspace_bytes(const LinearParams& p) {
  const int parts = parts_of(p);
  return parts == 1 ? 0 : parts * p.rows * p.out * int64_t{sizeof(float)};
}

Status linear_wide(const LinearParams& p, void* workspace, void* stream) {
  const LinearWide k{p, static_cast<float*>(workspace), parts_of(p)};
  return p.dtype == DType::kF16 ? launch_wide<f16>(k, stream) : launch_wide<bf16>(k, stream);
}

}  // namespace inferlab::cuda
