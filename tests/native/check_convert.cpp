// csrc/cuda/convert.cuh against dtype.h, bit for bit: every f16 and bf16, and fp32 with every sign,
// exponent and high mantissa over the low bits on which rounding turns. Prints the first
// difference.
#include "convert.cuh"

#include <cstdio>

using namespace inferlab;

namespace {

bool same(const char* what, uint32_t from, uint32_t got, uint32_t expected) {
  if (got == expected) return true;
  std::printf("%s of %08x is %08x, not %08x\n", what, from, got, expected);
  return false;
}

template <typename T>
bool check_loads(const char* what) {
  for (uint32_t u = 0; u < 0x10000u; ++u) {
    const T x{static_cast<uint16_t>(u)};
    if (!same(what, u, float_to_bits(cuda::load_float(x)), float_to_bits(to_float(x)))) {
      return false;
    }
  }
  return true;
}

template <typename T>
bool check_stores(const char* what) {
  constexpr uint32_t kLow[] = {0, 1, 2, 0x7fe, 0x7ff};
  for (uint32_t high = 0; high < 1u << 21; ++high) {
    for (const uint32_t low : kLow) {
      const uint32_t u = high << 11 | low;
      const float x = bits_to_float(u);
      if (!same(what, u, cuda::store_float<T>(x).bits, from_float<T>(x).bits)) return false;
    }
  }
  return true;
}

template <typename T>
bool check_vectors(const char* what) {
  // Neighbours 8192 apart: numbers of all sizes and NaN beside each other.
  for (uint32_t base = 0; base < 0x2000u; ++base) {
    alignas(16) T in[8], out[8];
    for (uint32_t i = 0; i < 8; ++i) in[i] = T{static_cast<uint16_t>(base + 0x2000u * i)};
    float wide[8];
    cuda::load_floats(in, wide);
    cuda::store_floats(out, wide);
    for (uint32_t i = 0; i < 8; ++i) {
      if (!same(what, base + i, float_to_bits(wide[i]), float_to_bits(to_float(in[i]))) ||
          !same(what, base + i, out[i].bits, from_float<T>(to_float(in[i])).bits)) {
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  alignas(16) const float in[4] = {1.0f, -0.0f, 3e38f, 1e-45f};
  alignas(16) float wide[4], out[4];
  cuda::load_floats(in, wide);
  cuda::store_floats(out, wide);
  const bool floats = std::memcmp(in, out, 16) == 0 && std::memcmp(in, wide, 16) == 0;
  if (!floats) std::printf("fp32 vectors differ\n");
  const bool ok = floats && check_loads<f16>("f16 load") && check_loads<bf16>("bf16 load") &&
                  check_stores<f16>("f16 store") && check_stores<bf16>("bf16 store") &&
                  check_vectors<f16>("f16 vector") && check_vectors<bf16>("bf16 vector");
  return ok ? 0 : 1;
}
