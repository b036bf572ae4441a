// kv_append: writes the K and V rows of new nodes to their slots.
//
// A block takes as many rows as fill its 256 threads (grid.x over the rows of a sequence, grid.y
// over sequences); a thread moves one word of K and the same word of V, both loaded before either
// is stored, and before the page is known. Words are 16 bytes where every address is a multiple of
// 16, else 2. Bytes: 2 * B * N * Hkv * D * s read and as many written.
#include "convert.cuh"
#include "inferlab/kv.h"
#include "launch.cuh"
#include "pages.cuh"

namespace inferlab::cuda {

// ---- kernel -------------------------------------------------------------------------------------

template <typename Word>
__global__ void __launch_bounds__(kRowThreads) append_kernel(KvAppendParams p) {
  const int head_words = static_cast<int>(p.head_bytes / sizeof(Word));
  const int words = head_words * static_cast<int>(p.heads);
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (n >= p.nodes) return;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    if (p.num_nodes != nullptr && n >= p.num_nodes[b]) continue;
    const SlotTable slots = slot_table(p, b, p.pages);
    const char* k = p.k + b * p.k_stride_bytes[0] + n * p.k_stride_bytes[1];
    const char* v = p.v + b * p.v_stride_bytes[0] + n * p.v_stride_bytes[1];
    for (int w = threadIdx.x; w < words; w += blockDim.x) {
      const int head = w / head_words;
      const int64_t in_head = static_cast<int64_t>(w - head * head_words) * sizeof(Word);
      const Word kw = *reinterpret_cast<const Word*>(k + head * p.k_stride_bytes[2] + in_head);
      const Word vw = *reinterpret_cast<const Word*>(v + head * p.v_stride_bytes[2] + in_head);
      const int64_t row = slots.row_of(p.seq_lens[b] + p.node_offset + n);
      if (row < 0) continue;
      const int64_t to = row * words + w;
      reinterpret_cast<Word*>(p.k_pages)[to] = kw;
      reinterpret_cast<Word*>(p.v_pages)[to] = vw;
    }
  }
}

// ---- launcher -----------------------------------------------------------------------------------

Status kv_append(const KvAppendParams& p, void* stream) {
  bool wide = all_multiples_of_16(p.k, p.v, p.k_pages, p.v_pages, p.head_bytes);
  for (int i = 0; i < 3; ++i) wide &= all_multiples_of_16(p.k_stride_bytes[i], p.v_stride_bytes[i]);
  const int64_t words = p.heads * p.head_bytes / (wide ? sizeof(uint4) : sizeof(uint16_t));
  const dim3 block = row_block(words);
  const int64_t spans = (p.nodes + block.y - 1) / block.y;
  if (spans > kMaxGridX || words > INT32_MAX) return Status::kBadArgument;
  const dim3 grid(static_cast<unsigned>(spans),
                  static_cast<unsigned>(p.batch < kMaxGridYZ ? p.batch : kMaxGridYZ));
  const auto kernel = wide ? append_kernel<uint4> : append_kernel<uint16_t>;
  return launch(kernel, grid, block, 0, stream, p);
}

}  // namespace inferlab::cuda
