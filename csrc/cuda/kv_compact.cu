// kv_compact: moves the accepted nodes' rows to the front, in place, all layers in one launch.
//
// A column is one word of the rows of one sequence in K or V of one layer. Each thread owns one
// column (grid.x over the columns of a sequence, grid.y over sequences) and copies upwards:
// accepted nodes increase, so a_j >= j, and what a row overwrites was read before. It reads kAhead
// rows before it writes them, which is as safe: the rows that come later lie behind all that is
// written. The block looks up a_j, its page and its target's page once per row. Columns are 16
// bytes wide where rows are multiples of 16, else 2. Bytes: 2 * L * moved rows * Hkv * D * s read
// and as many written; with few rows it is four dependent accesses and the launch that take the
// time.
#include "convert.cuh"
#include "inferlab/kv.h"
#include "launch.cuh"
#include "pages.cuh"

namespace inferlab::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 4;
constexpr int kBlocksPerSm = 6;

struct Moves {
  int64_t from[kThreads];  // rows of the pool; -1: nothing to move
  int64_t to[kThreads];
};

// Moves of path steps [begin, begin + kThreads) of sequence b; whether there are any.
__device__ bool look_up_moves(const KvCompactParams& p, int64_t b, int64_t begin, int64_t count,
                              Moves& moves) {
  const int64_t j = begin + threadIdx.x;
  int64_t from = -1, to = -1;
  if (j < count) {
    const int64_t node = p.accepted[b * p.steps + j];
    if (node > j) {
      const SlotTable slots = slot_table(p, b, p.pages);
      from = slots.row_of(p.seq_lens[b] + node);
      to = slots.row_of(p.seq_lens[b] + j);
    }
  }
  moves.from[threadIdx.x] = to < 0 ? -1 : from;
  moves.to[threadIdx.x] = to;
  return __syncthreads_or(to >= 0 && from >= 0) != 0;
}

template <typename Word>
__device__ void move_column(Word* column, int64_t row_words, const Moves& moves, int steps) {
  for (int j = 0; j < steps; j += kAhead) {
    Word word[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int64_t from = j + i < steps ? moves.from[j + i] : -1;
      if (from >= 0) word[i] = column[from * row_words];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (j + i < steps && moves.from[j + i] >= 0) column[moves.to[j + i] * row_words] = word[i];
    }
  }
}

}  // namespace

// ---- kernel -------------------------------------------------------------------------------------

template <typename Word>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) compact_kernel(KvCompactParams p) {
  Moves& moves = shared_memory<Moves>();
  const uint32_t row_words =
      static_cast<uint32_t>(p.row_bytes / static_cast<int64_t>(sizeof(Word)));
  const uint32_t column = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t plane = column / row_words;  // layer and K or V
  const bool mine = plane < 2 * p.layers;
  Word* cache = reinterpret_cast<Word*>(plane & 1 ? p.v_cache : p.k_cache) +
                (plane >> 1) * (p.pages * p.page_size * row_words) + column % row_words;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const int64_t count = p.num_accepted[b] < p.steps ? p.num_accepted[b] : p.steps;
    for (int64_t begin = 0; begin < count; begin += kThreads) {
      const bool any = look_up_moves(p, b, begin, count, moves);
      const int steps = static_cast<int>(count - begin < kThreads ? count - begin : kThreads);
      if (any && mine) move_column(cache, row_words, moves, steps);
      __syncthreads();  // before the moves are replaced
    }
  }
}

// ---- launcher -----------------------------------------------------------------------------------

Status kv_compact(const KvCompactParams& p, void* stream) {
  const bool wide = all_multiples_of_16(p.k_cache, p.v_cache, p.row_bytes);
  const int64_t row_words = p.row_bytes / (wide ? sizeof(uint4) : sizeof(uint16_t));
  const int64_t columns = 2 * p.layers * row_words;
  const int64_t blocks = (columns + kThreads - 1) / kThreads;
  if (p.steps == 0) return Status::kOk;
  if (columns > INT32_MAX) return Status::kBadArgument;
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(p.batch < kMaxGridYZ ? p.batch : kMaxGridYZ));
  const auto kernel = wide ? compact_kernel<uint4> : compact_kernel<uint16_t>;
  return launch(kernel, grid, dim3(kThreads), sizeof(Moves), stream, p);
}

}  // namespace inferlab::cuda
