// rope_append: rotates q in place and writes the rotated k, and v, to the pages.
//
// A token's work is a list of items, one per thread: the pairs of channels (i, i + rotary / 2) of
// every head of q and k, the channels of k that are not rotated, and the channels of v; an item is
// 16 bytes of each (one element of each where addresses or rotary / 2 do not allow that). grid.x
// runs over the tokens of a sequence, grid.y over sequences, grid.z over a token's items. A pair is
// read and written by one thread, so that q may be rotated where it lies. Bytes:
// B * N * (Hq + 2 * Hkv) * D * s read and as many written.
#include "elements.cuh"
#include "inferlab/layer.h"
#include "launch.cuh"
#include "pages.cuh"

namespace inferlab::cuda {
namespace {

constexpr int kThreads = 128;

// Items of one head: of a rotated one, of the rest of it, of a copied one.
template <typename T, bool kWide>
struct Items {
  int pairs, rest, whole;
  __host__ __device__ explicit Items(const RopeAppendParams& p)
      : pairs(static_cast<int>(p.rotary / 2) / kStep<T, kWide>),
        rest(static_cast<int>(p.head_dim - p.rotary) / kStep<T, kWide>),
        whole(static_cast<int>(p.head_dim) / kStep<T, kWide>) {}

  __host__ __device__ int64_t of_token(const RopeAppendParams& p) const {
    return p.q_heads * pairs + p.kv_heads * (pairs + rest + whole);
  }
};

}  // namespace

// ---- kernel -------------------------------------------------------------------------------------

// (a, b) -> (a cos - b sin, b cos + a sin), rounded where the unfused layer rounds.
template <typename T, bool kWide>
__device__ __forceinline__ void rotate(const T* x, const T* cos, const T* sin, T* out, int64_t half,
                                       int64_t i) {
  constexpr int kElements = kStep<T, kWide>;
  float a[kElements], b[kElements], cos_a[kElements], cos_b[kElements], sin_a[kElements],
      sin_b[kElements];
  read<T, kWide>(x + i, a);
  read<T, kWide>(x + half + i, b);
  read<T, kWide>(cos + i, cos_a);
  read<T, kWide>(cos + half + i, cos_b);
  read<T, kWide>(sin + i, sin_a);
  read<T, kWide>(sin + half + i, sin_b);
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    const float first = round_to<T>(a[e] * cos_a[e]) - round_to<T>(b[e] * sin_a[e]);
    b[e] = round_to<T>(b[e] * cos_b[e]) + round_to<T>(a[e] * sin_b[e]);
    a[e] = first;
  }
  write<T, kWide>(out + i, a);
  write<T, kWide>(out + half + i, b);
}

template <typename T, bool kWide>
__device__ void do_item(const RopeAppendParams& p, int64_t b, int64_t n, int item) {
  const Items<T, kWide> items(p);
  const int64_t half = p.rotary / 2;
  const T* cos = static_cast<const T*>(p.cos) + b * p.cos_stride + n * p.rotary;
  const T* sin = static_cast<const T*>(p.sin) + b * p.cos_stride + n * p.rotary;
  if (item < p.q_heads * items.pairs) {
    T* q = static_cast<T*>(p.q) + b * p.q_stride[0] + n * p.q_stride[1] +
           item / items.pairs * p.head_dim;
    rotate<T, kWide>(q, cos, sin, q, half, item % items.pairs * kStep<T, kWide>);
    return;
  }
  item -= static_cast<int>(p.q_heads) * items.pairs;
  const int64_t row = slot_table(p, b, p.pages).row_of(p.seq_lens[b] + p.node_offset + n);
  if (row < 0) return;
  const int64_t to = row * p.kv_heads * p.head_dim;
  const int of_k = static_cast<int>(p.kv_heads) * (items.pairs + items.rest);
  if (item < of_k) {
    const int head = item / (items.pairs + items.rest), i = item % (items.pairs + items.rest);
    const T* k =
        static_cast<const T*>(p.k) + b * p.k_stride[0] + n * p.k_stride[1] + head * p.head_dim;
    T* out = static_cast<T*>(p.k_pages) + to + head * p.head_dim;
    if (i < items.pairs) {
      rotate<T, kWide>(k, cos, sin, out, half, i * kStep<T, kWide>);
    } else {
      const int64_t channel = p.rotary + (i - items.pairs) * kStep<T, kWide>;
      copy<T, kWide>(k + channel, out + channel);
    }
    return;
  }
  const int64_t i = (item - of_k) * kStep<T, kWide>;  // heads of v lie side by side
  const T* v = static_cast<const T*>(p.v) + b * p.v_stride[0] + n * p.v_stride[1];
  copy<T, kWide>(v + i, static_cast<T*>(p.v_pages) + to + i);
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads) rope_append_kernel(RopeAppendParams p) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int item = static_cast<int>(blockIdx.z) * kThreads + threadIdx.x;
  const int64_t n = blockIdx.x;
  if (item >= Items<T, kWide>(p).of_token(p)) return;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    if (p.num_nodes == nullptr || n < p.num_nodes[b]) do_item<T, kWide>(p, b, n, item);
  }
}

// ---- launcher -----------------------------------------------------------------------------------

template <typename T, bool kWide>
Status launch_rope_append(const RopeAppendParams& p, void* stream) {
  const int64_t blocks = (Items<T, kWide>(p).of_token(p) + kThreads - 1) / kThreads;
  if (p.nodes > kMaxGridX || blocks > kMaxGridYZ) return Status::kBadArgument;
  const dim3 grid(static_cast<unsigned>(p.nodes),
                  static_cast<unsigned>(p.batch < kMaxGridYZ ? p.batch : kMaxGridYZ),
                  static_cast<unsigned>(blocks));
  return launch(rope_append_kernel<T, kWide>, grid, dim3(kThreads), 0, stream, p,
                Blocks::kIndependent, Start::kEarly);
}

Status rope_append(const RopeAppendParams& p, void* stream) {
  return with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t size = sizeof(T);
    bool wide = all_multiples_of_16(p.q, p.k, p.v, p.cos, p.sin, p.k_pages, p.v_pages,
                                    p.cos_stride * size, p.rotary / 2 * size, p.head_dim * size);
    for (int i = 0; i < 2; ++i) {
      wide &= all_multiples_of_16(p.q_stride[i] * size, p.k_stride[i] * size, p.v_stride[i] * size);
    }
    return wide ? launch_rope_append<T, true>(p, stream) : launch_rope_append<T, false>(p, stream);
  });
}

}  // namespace inferlab::cuda
