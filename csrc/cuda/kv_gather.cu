// kv_gather: the slots of each sequence as one dense array, zeros behind its length.
//
// A block takes kSteps times the rows that fill its 256 threads (grid.x over the rows of a
// sequence, grid.y over sequences); a thread reads one word of each of its kSteps rows before it
// stores any, so that enough bytes are under way to fill the memory's pipe. Words are 16 bytes
// where every address is a multiple of 16, else 2. Bytes: the filled rows read, B * max_len * Hkv *
// D * s written.
#include "convert.cuh"
#include "inferlab/kv.h"
#include "launch.cuh"
#include "pages.cuh"

namespace inferlab::cuda {

// ---- kernel -------------------------------------------------------------------------------------

constexpr int kSteps = 4;

template <typename Word>
__global__ void __launch_bounds__(kRowThreads) gather_kernel(KvGatherParams p) {
  const int words = static_cast<int>(p.row_bytes / sizeof(Word));
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y * kSteps + threadIdx.y;
  const Word* pages = reinterpret_cast<const Word*>(p.pool);
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const SlotTable slots = slot_table(p, b, p.pages);
    const int64_t length = p.seq_lens[b];
    int64_t row[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int64_t slot = first + i * blockDim.y;
      row[i] = slot < length ? slots.row_of(slot) : -1;
    }
    Word* out = reinterpret_cast<Word*>(p.out) + b * p.max_len * words;
    for (int w = threadIdx.x; w < words; w += blockDim.x) {
      Word word[kSteps];
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        word[i] = row[i] >= 0 ? pages[row[i] * words + w] : Word{};
      }
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        const int64_t slot = first + i * blockDim.y;
        if (slot < p.max_len) out[slot * words + w] = word[i];
      }
    }
  }
}

// ---- launcher -----------------------------------------------------------------------------------

Status kv_gather(const KvGatherParams& p, void* stream) {
  const bool wide = all_multiples_of_16(p.pool, p.out, p.row_bytes);
  const int64_t words = p.row_bytes / (wide ? sizeof(uint4) : sizeof(uint16_t));
  if (words == 0) return Status::kOk;
  const dim3 block = row_block(words);
  const int64_t per_block = static_cast<int64_t>(block.y) * kSteps;
  const int64_t spans = (p.max_len + per_block - 1) / per_block;
  if (spans > kMaxGridX || words > INT32_MAX) return Status::kBadArgument;
  const dim3 grid(static_cast<unsigned>(spans),
                  static_cast<unsigned>(p.batch < kMaxGridYZ ? p.batch : kMaxGridYZ));
  const auto kernel = wide ? gather_kernel<uint4> : gather_kernel<uint16_t>;
  return launch(kernel, grid, block, 0, stream, p);
}

}  // namespace inferlab::cuda
