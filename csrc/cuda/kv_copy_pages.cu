// kv_copy_pages: copies whole pages inside the K and V caches of all layers.
//
// Each block copies one kBlockBytes piece of one page of one layer of K or V; grid.x runs over the
// pieces of a page, grid.y over the pairs (src, dst), grid.z over 2 * layers. Threads move 16 bytes
// at a time where a page is a multiple of 16 bytes, 2 otherwise (elements are 2 or 4 bytes). Bytes:
// 2 * L * M * page_bytes read and as many written. Pairs out of [0, pages) are skipped.
#include "inferlab/kv.h"
#include "launch.cuh"

namespace inferlab::cuda {

// ---- kernel -------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int64_t kBlockBytes = 16 * 1024;
constexpr unsigned kMaxGridY = 65535;

template <typename Word>
__global__ void __launch_bounds__(kThreads, 4) copy_pages_kernel(KvCopyPagesParams p) {
  char* cache = blockIdx.z & 1 ? p.v_cache : p.k_cache;
  const int64_t first_page = static_cast<int64_t>(blockIdx.z >> 1) * p.pages;  // of the layer
  const int64_t begin = blockIdx.x * kBlockBytes;
  const int64_t bytes = begin + kBlockBytes < p.page_bytes ? kBlockBytes : p.page_bytes - begin;
  const int words = static_cast<int>(bytes / static_cast<int64_t>(sizeof(Word)));
  for (int64_t i = blockIdx.y; i < p.moves; i += gridDim.y) {
    const int64_t src = p.src[i], dst = p.dst[i];
    if (src < 0 || src >= p.pages || dst < 0 || dst >= p.pages || src == dst) continue;
    const Word* from =
        reinterpret_cast<const Word*>(cache + (first_page + src) * p.page_bytes + begin);
    Word* to = reinterpret_cast<Word*>(cache + (first_page + dst) * p.page_bytes + begin);
#pragma unroll 4
    for (int w = threadIdx.x; w < words; w += kThreads) to[w] = from[w];
  }
}

// ---- launcher -----------------------------------------------------------------------------------

Status kv_copy_pages(const KvCopyPagesParams& p, void* stream) {
  if (p.moves == 0 || p.layers == 0 || p.page_bytes == 0) return Status::kOk;
  if (2 * p.layers > kMaxGridY) return Status::kBadArgument;
  const dim3 grid(static_cast<unsigned>((p.page_bytes + kBlockBytes - 1) / kBlockBytes),
                  static_cast<unsigned>(p.moves < kMaxGridY ? p.moves : kMaxGridY),
                  static_cast<unsigned>(2 * p.layers));
  const uintptr_t bits = reinterpret_cast<uintptr_t>(p.k_cache) |
                         reinterpret_cast<uintptr_t>(p.v_cache) |
                         static_cast<uintptr_t>(p.page_bytes);
  const auto kernel =
      bits % sizeof(uint4) == 0 ? copy_pages_kernel<uint4> : copy_pages_kernel<uint16_t>;
  return launch(kernel, grid, dim3(kThreads), 0, stream, p);
}

}  // namespace inferlab::cuda
