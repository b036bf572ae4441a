// A head's numbers on their way into a page of 8 bits. The same bits on every instruction set.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "inferlab/page_format.h"

namespace inferlab::cpu::INFERLAB_ISA {

// The largest number becomes 127, and its 127th the scale. Numbers that are not finite make the
// scale NaN, and with it all that is read of this head.
template <typename T>
void write_int8(const T* x, int64_t dim, char* to) {
  constexpr float kShift = 0x1.8p23f;  // added, it leaves a rounded integer in the lowest bits
  constexpr uint32_t kInfinite = 0x7f800000u;
  uint32_t bits = 0;  // magnitudes are ordered as their bits are
  for (int64_t d = 0; d < dim; ++d) {
    bits = std::max(bits, float_to_bits(to_float(x[d])) & 0x7fffffffu);
  }
  const float largest = bits_to_float(bits);
  const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
  float scale = inverse == 0.0f ? 0.0f : largest / 127.0f;
  if (bits >= kInfinite) scale = std::numeric_limits<float>::quiet_NaN();
  for (int64_t d = 0; d < dim; ++d) {
    to[d] = static_cast<char>(float_to_bits(to_float(x[d]) * inverse + kShift));
  }
  std::memcpy(to + dim, &scale, sizeof scale);
}

// `format`: not kSame. `to`: page_head_bytes.
template <typename T>
void write_head(const T* x, int64_t dim, PageFormat format, char* to) {
  if (format == PageFormat::kInt8) return write_int8(x, dim, to);
  for (int64_t d = 0; d < dim; ++d) {
    to[d] = static_cast<char>(from_float<e4m3>(to_float(x[d])).bits);
  }
}

}  // namespace inferlab::cpu::INFERLAB_ISA
