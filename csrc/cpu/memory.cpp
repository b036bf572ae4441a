#include "inferlab/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace inferlab::cpu {

#if defined(__linux__)
namespace {

// For the whole pages of the system inside [data, data + bytes).
bool advise(void* data, int64_t bytes, int advice) {
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  if (begin >= end) return false;
  return madvise(reinterpret_cast<void*>(begin), end - begin, advice) == 0;
}

}  // namespace

// KV pages are read in an order that only the block table knows. In 4 KiB pages of the system each
// few KiB of them cost a walk through the system's page tables, itself a miss; large pages do not.
bool advise_large_pages(void* data, int64_t bytes) { return advise(data, bytes, MADV_HUGEPAGE); }

bool discard_pages(void* data, int64_t bytes) { return advise(data, bytes, MADV_DONTNEED); }
#else
bool advise_large_pages(void*, int64_t) { return false; }
bool discard_pages(void*, int64_t) { return false; }
#endif

}  // namespace inferlab::cpu
