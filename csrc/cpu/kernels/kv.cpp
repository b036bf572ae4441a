// Memory moves of the KV ops. Large copies go around the caches: a line that is stored whole need
// not be read first, so n bytes cost n read and n written instead of 2 n read and n written.
#include <cstdint>
#include <cstring>

#include "inferlab/kv.h"
#include "page_head.h"
#include "with_dtype.h"

#if defined(INFERLAB_ISA_AVX2) || defined(INFERLAB_ISA_AVX512)
#include <immintrin.h>
#endif

namespace inferlab::cpu::INFERLAB_ISA {

#if defined(INFERLAB_ISA_AVX512)
using Line = __m512i;
inline Line load_line(const char* p) { return _mm512_loadu_si512(p); }
inline void stream_line(char* p, Line x) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), x); }
#elif defined(INFERLAB_ISA_AVX2)
struct Line {
  __m256i low, high;
};
inline Line load_line(const char* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline void stream_line(char* p, Line x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), x.low);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p + 32), x.high);
}
#endif

// Copies `bytes` from src to dst (apart from each other); `streaming` stores past the caches.
void copy_bytes(char* dst, const char* src, int64_t bytes, bool streaming) {
#if defined(INFERLAB_ISA_AVX2) || defined(INFERLAB_ISA_AVX512)
  if (streaming && bytes >= 256) {
    const int64_t head = (64 - (reinterpret_cast<uintptr_t>(dst) & 63)) & 63;
    std::memcpy(dst, src, static_cast<size_t>(head));
    dst += head;
    src += head;
    bytes -= head;
    const int64_t lines = bytes / 64;
    for (int64_t i = 0; i < lines; ++i) {
      _mm_prefetch(src + 64 * i + 1024, _MM_HINT_T0);
      stream_line(dst + 64 * i, load_line(src + 64 * i));
    }
    dst += 64 * lines;
    src += 64 * lines;
    bytes -= 64 * lines;
  }
#else
  (void)streaming;
#endif
  std::memcpy(dst, src, static_cast<size_t>(bytes));
}

// Heads of one token of k or v, `stride` elements apart, into its row of a page of 8 bits.
void write_row(const KvAppendParams& p, const void* heads, int64_t stride, char* row) {
  const int64_t dim = p.head_bytes / dtype_size(p.dtype);
  const int64_t bytes = page_head_bytes(p.format, dim, p.dtype);
  with_dtype(p.dtype, [&](auto zero) {
    const auto* x = static_cast<const decltype(zero)*>(heads);
    for (int64_t h = 0; h < p.heads; ++h) {
      write_head(x + h * stride, dim, p.format, row + h * bytes);
    }
  });
}

// Makes streamed stores visible to other threads; call once per task.
void finish_stores() {
#if defined(INFERLAB_ISA_AVX2) || defined(INFERLAB_ISA_AVX512)
  _mm_sfence();
#endif
}

}  // namespace inferlab::cpu::INFERLAB_ISA
