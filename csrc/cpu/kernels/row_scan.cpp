// Reading passes over a row: block maxima, rank keys of the large elements, the float32 copy. Bytes
// moved: the row once (scan, count, widen); only the blocks that qualify (collect).
#include "row_kernels.h"
#include "simd.h"

namespace inferlab::cpu::INFERLAB_ISA {
namespace {

template <typename T>
bool scan(const T* x, const Row& row, int64_t begin, int64_t end) {
  uint32_t nan = 0;
  for (int64_t b = begin / row.block; b * row.block < end; ++b) {
    const int64_t first = b * row.block;
    const int64_t last = first + row.block < end ? first + row.block : end;
    float best = -kInf;
    if (last - first == row.block) {
      vf m0 = vset(-kInf), m1 = m0;
      for (int64_t i = first; i < last; i += 2 * kLanes) {
        const vf a = vload(x + i), c = vload(x + i + kLanes);
        nan |= visnan(a) | visnan(c);
        m0 = vmax(m0, a);
        m1 = vmax(m1, c);
      }
      best = vreduce_max(vmax(m0, m1));
    } else {
      for (int64_t i = first; i < last; ++i) {
        const float l = to_float(x[i]);
        nan |= l != l ? 1u : 0u;
        best = l > best ? l : best;
      }
    }
    row.block_max[b] = best;
  }
  return nan == 0;
}

template <typename T>
int64_t collect(const T* x, const Row& row, float least, uint64_t* keys) {
  int64_t count = 0;
  const vf bound = vset(least);
  for (int64_t b = 0; b * row.block < row.size; ++b) {
    if (!(row.block_max[b] >= least)) continue;
    const int64_t first = b * row.block;
    const int64_t last = first + row.block < row.size ? first + row.block : row.size;
    int64_t i = first;
    for (; i + kLanes <= last; i += kLanes) {
      for (uint32_t m = vge(vload(x + i), bound); m != 0; m &= m - 1) {
        const int64_t t = i + __builtin_ctz(m);
        keys[count++] = rank_key(to_float(x[t]), static_cast<uint32_t>(t));
      }
    }
    for (; i < last; ++i) {
      const float l = to_float(x[i]);
      if (l >= least) keys[count++] = rank_key(l, static_cast<uint32_t>(i));
    }
  }
  return count;
}

template <typename T>
int64_t count_ge(const T* x, const Row& row, float least) {
  int64_t count = 0, i = 0;
  const vf bound = vset(least);
  for (; i + kLanes <= row.size; i += kLanes) {
    count += __builtin_popcount(vge(vload(x + i), bound));
  }
  for (; i < row.size; ++i) count += to_float(x[i]) >= least ? 1 : 0;
  return count;
}

template <typename T>
void copy(const T* x, int64_t begin, int64_t end, float* out) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) vstore(out + i, vload(x + i));
  for (; i < end; ++i) out[i] = to_float(x[i]);
}

}  // namespace

bool scan_blocks(const Row& row, int64_t begin, int64_t end) {
  return INFERLAB_BY_DTYPE(row, scan, row, begin, end);
}

int64_t collect_keys(const Row& row, float least, uint64_t* keys) {
  return INFERLAB_BY_DTYPE(row, collect, row, least, keys);
}

int64_t count_at_least(const Row& row, float least) {
  return INFERLAB_BY_DTYPE(row, count_ge, row, least);
}

void widen(const Row& row, int64_t begin, int64_t end, float* out) {
  INFERLAB_BY_DTYPE(row, copy, begin, end, out);
}

}  // namespace inferlab::cpu::INFERLAB_ISA
