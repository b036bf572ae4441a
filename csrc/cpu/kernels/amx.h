// AMX: eight tile registers of 16 rows by 64 bytes, and c += a b on tiles of bf16 with fp32 sums.
// Instructions are written out, since compilers disagree on how their intrinsics take a register.
// Only where active_isa() is Isa::kAmx, between a TileScope's begin and end.
#pragma once

#include <cstdint>

namespace inferlab::cpu::INFERLAB_ISA {

// Tiles 0-3: sums of 16 rows by `columns`. 4, 5: a, 16 rows by 32 bf16. 6, 7: b, 32 bf16 by
// `columns`, two of them side by side in a dword: row i holds k = 2 i and 2 i + 1 of each column.
class TileScope {
 public:
  explicit TileScope(int columns) {
    Config config;
    for (int t = 0; t < 8; ++t) config.set(t, 16, t == 4 || t == 5 ? 64 : 4 * columns);
    load(config);
  }
  // With tiles of another kind of product besides, of few rows: 2, 3: sums of `rows` rows by 16;
  // 7: a, `rows` rows by 32 bf16. Its b are 4 and 5.
  TileScope(int columns, int rows) {
    Config config;
    for (int t = 0; t < 8; ++t) config.set(t, 16, t == 4 || t == 5 ? 64 : 4 * columns);
    for (const int t : {2, 3, 7}) config.set(t, rows, 64);
    load(config);
  }
  ~TileScope() { asm volatile("tilerelease"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int height, int bytes) {
      rows[tile] = static_cast<uint8_t>(height);
      row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
  };
  static void load(const Config& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
};

template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void tile_load(const void* p, int64_t row_stride_bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(p), "r"(row_stride_bytes)
               : "memory");
}
template <int kTile>
inline void tile_store(void* p, int64_t row_stride_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(p), "r"(row_stride_bytes)
               : "memory");
}
// Each sum takes its products in the order of k, whatever its place in the tile.
template <int kSum, int kA, int kB>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

}  // namespace inferlab::cpu::INFERLAB_ISA
