// Products with packed weights, bit by bit: the inner sums are whole numbers and the outer ones are
// in order, so plain loops can tell what every instruction set must give.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "check_random.h"
#include "inferlab/linear.h"
#include "inferlab/packed_weight.h"
#include "isa.h"

using namespace inferlab;

namespace {

struct Case {
  int bits;
  bool zeros;
  int64_t group, rows, in, out;
};

bool check(const Case& c) {
  Random random;
  LinearParams p{};
  p.rows = c.rows;
  p.in = p.x_stride = c.in;
  p.out = c.out;
  p.dtype = DType::kF32;
  p.bits = c.bits;
  p.group = c.group;
  p.zeros = c.zeros;
  const int64_t groups = packed_groups(p), tile = packed_tile_bytes(p);
  const int64_t scales = c.bits == 8 ? 1 : groups, head = packed_scale_bytes(p);
  std::vector<uint8_t> weight(packed_tiles(p) * tile);
  for (uint8_t& byte : weight) byte = static_cast<uint8_t>(random.next());
  for (int64_t t = 0; t < packed_tiles(p); ++t) {
    for (int64_t i = 0; i < scales * kPackedOutputs; ++i) {
      const float scale = 0.01f * random.number();
      const uint16_t bits = c.zeros ? from_float<f16>(scale).bits : from_float<bf16>(scale).bits;
      std::memcpy(weight.data() + t * tile + 2 * i, &bits, 2);
    }
  }
  std::vector<float> x(c.rows * c.in), y(c.rows * c.out);
  for (float& value : x) value = random.number();
  for (int64_t i = 0; i < c.in / 2; ++i) x[i] = 0;  // whole groups of nothing
  p.x = x.data();
  p.weight = weight.data();
  p.y = y.data();
  if (cpu::linear(p) != Status::kOk) return false;

  const auto scale_of = [&](int64_t n, int64_t g) {
    uint16_t bits;
    const uint8_t* of_tile = weight.data() + n / kPackedOutputs * tile;
    std::memcpy(&bits, of_tile + 2 * (g * kPackedOutputs + n % kPackedOutputs), 2);
    return c.zeros ? to_float(f16{bits}) : to_float(bf16{bits});
  };
  const auto zero_of = [&](int64_t n, int64_t g) {
    if (!c.zeros) return c.bits == 8 ? 128 : 8;
    const uint8_t* zeros = weight.data() + n / kPackedOutputs * tile + 2 * groups * kPackedOutputs;
    return int{zeros[g * kPackedOutputs + n % kPackedOutputs]};
  };
  const auto q_of = [&](int64_t n, int64_t k) {
    const uint8_t* q = weight.data() + n / kPackedOutputs * tile + head;
    const int64_t lane = n % kPackedOutputs;
    if (c.bits == 8) return int{q[k / 4 * 64 + lane * 4 + k % 4]};
    const int byte = q[k / 8 * 64 + lane * 4 + k % 4];
    return k % 8 < 4 ? byte & 15 : byte >> 4;
  };
  for (int64_t m = 0; m < c.rows; ++m) {
    for (int64_t n = 0; n < c.out; ++n) {
      float sum = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = g * c.group, end = std::min(begin + c.group, c.in);
        float most = 0;
        for (int64_t k = begin; k < end; ++k) most = std::max(most, std::fabs(x[m * c.in + k]));
        const float inverse = most > 0 ? 127.0f / most : 0.0f;
        int64_t whole = 0;
        for (int64_t k = begin; k < end; ++k) {
          const auto rounded = static_cast<int64_t>(std::nearbyint(x[m * c.in + k] * inverse));
          whole += (q_of(n, k) - zero_of(n, g)) * rounded;
        }
        const float dot = static_cast<float>(whole), step = most / 127.0f;
        sum = c.bits == 8 ? std::fma(dot, step, sum) : std::fma(dot * step, scale_of(n, g), sum);
      }
      const float expected = c.bits == 8 ? sum * scale_of(n, 0) : sum;
      if (std::memcmp(&expected, &y[m * c.out + n], 4) != 0) {
        std::printf("%d bits, row %d, output %d: %.9g, not %.9g\n", c.bits, static_cast<int>(m),
                    static_cast<int>(n), y[m * c.out + n], expected);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  bool good = true;
  for (const char* isa : {"generic", "avx2", "avx512"}) {
    if (!cpu::force_isa(isa)) continue;
    for (int64_t rows = 1; rows <= 27; rows += rows < 8 ? 1 : 6) {
      for (const int64_t group : {32, 64, 128}) {
        for (const auto& [bits, zeros] : {std::pair{8, false}, {4, false}, {4, true}}) {
          good = check({bits, zeros, group, rows, 200, 37}) && good;
          good = check({bits, zeros, group, rows, 5, 16}) && good;
        }
      }
    }
    std::printf("%s: %s\n", isa, good ? "the same" : "differs");
  }
  return good ? 0 : 1;
}
