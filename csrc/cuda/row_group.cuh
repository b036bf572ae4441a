// A group of blocks that share one row of logits, each reading its own slice. They tell each other
// what they found in rounds: every block fills its board in shared memory, all meet, and every
// block sees the boards merged into one. So all blocks of a group decide alike, from equal data.
//
// A group of one block meets by __syncthreads and needs no workspace. Larger groups meet in the
// workspace: boards are merged by atomics (one thread per block), an arrival counter that only
// grows is the barrier. Every round has boards of its own, three in turn: while round r is filled,
// slow blocks may still read round r - 1, and nobody reads round r - 2, which is cleared for round
// r + 1.
#pragma once

#include "row_block.cuh"

namespace inferlab::cuda {

constexpr int kBuckets = kThreads;     // of a histogram: one for each thread
constexpr int kListed = 2 * kThreads;  // candidates that a group can list
constexpr int kRounds = 3;
constexpr int kSumParts = 4;

// What is found of a row. All zero: nothing.
struct Board {
  uint64_t best;            // largest rank_key (weights.h)
  uint64_t sum[kSumParts];  // row_weights.cuh
  uint32_t bad;             // a NaN or +inf was seen
  uint32_t max;             // ordered_bits of the largest element
  uint32_t min;             // complement of ordered_bits of the smallest finite one
  uint32_t listed;
};

struct GroupBoards {  // zero before the launch
  Board boards[kRounds];
  uint32_t arrived;
};

struct GroupLists {
  uint64_t mass[kRounds][kBuckets];
  uint64_t list[kRounds][kListed];
  uint32_t count[kRounds][kBuckets];
};

struct Bucket {
  uint32_t count;
  uint64_t mass;
};

// The first bucket whose running sum reaches what is looked for.
struct Crossing {
  uint32_t index;  // kBuckets: none does
  uint32_t count, count_before;
  uint64_t mass_before;
};

// Also holds what would take registers everywhere and is rarely used.
struct RowShared {
  Board mine, seen;
  GroupBoards* boards;
  GroupLists* lists;
  uint64_t sums[kWarps];
  uint64_t list[kListed];
  uint64_t total;
  Crossing crossing;
  uint32_t count[kBuckets];
  uint32_t mass_low[kBuckets], mass_high[kBuckets];
  uint32_t list_offset;
  struct {
    float repetition, presence, frequency;
    bool context;  // whether any of them counts
  } penalty;
};

// A relaxed load that is not served from this multiprocessor's cache.
__device__ __forceinline__ uint32_t load_shared_word(const uint32_t* p) {
#if defined(INFERLAB_CUDA_SHIM)
  return __atomic_load_n(p, __ATOMIC_RELAXED);
#else
  return *static_cast<const volatile uint32_t*>(p);
#endif
}

class Group {
 public:
  // boards, lists: of this group; not used where size is 1.
  __device__ Group(RowShared& shared, uint32_t rank, uint32_t size, GroupBoards* boards,
                   GroupLists* lists)
      : shared(shared), rank(rank), size(size) {
    if (threadIdx.x == 0) {
      shared.mine = Board{};
      shared.boards = boards;
      shared.lists = lists;
    }
    __syncthreads();
  }

  RowShared& shared;
  const uint32_t rank, size;

  __device__ __forceinline__ bool leads() const { return rank == 0; }

  // This block's part of [0, n): whole vectors of 8.
  __device__ __forceinline__ uint32_t begin(uint32_t n) const {
    const uint64_t at = static_cast<uint64_t>(slice(n)) * rank;
    return at < n ? static_cast<uint32_t>(at) : n;
  }
  __device__ __forceinline__ uint32_t end(uint32_t n) const {
    const uint64_t at = static_cast<uint64_t>(slice(n)) * (rank + 1);
    return at < n ? static_cast<uint32_t>(at) : n;
  }

  // Called by whole warps: the best key and whether something bad was seen.
  __device__ __forceinline__ void tell_best(uint64_t key, bool bad) {
    key = warp_max(key);
    bad = __any_sync(kAllLanes, bad) != 0;
    if (lane_index() != 0) return;
    if (key != 0) atomic_max(&shared.mine.best, key);
    if (bad) atomicOr(&shared.mine.bad, 1u);
  }

  // Ends the round. What is returned holds until the next meeting.
  __device__ const Board& meet() {
    const uint32_t now = round_ % kRounds;
    if (size > 1 && leads()) clear((round_ + 1) % kRounds);
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.seen = size > 1 ? merge(shared.boards->boards[now]) : shared.mine;
      shared.mine = Board{};
    }
    __syncthreads();
    ++round_;
    return shared.seen;
  }

  // A meeting after which every block has the lists of all, one after the other in no order.
  // Returns the number of entries.
  __device__ int meet_lists() {
    const uint32_t now = round_ % kRounds;
    __syncthreads();
    if (size > 1) {
      const uint32_t n = shared.mine.listed;
      if (threadIdx.x == 0 && n > 0) {
        shared.list_offset = atomicAdd(&shared.boards->boards[now].listed, n);
      }
      __syncthreads();
      for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
        const uint32_t at = shared.list_offset + i;
        if (at < kListed) shared.lists->list[now][at] = shared.list[i];
      }
    }
    const uint32_t all = meet().listed;
    const int n = static_cast<int>(all < kListed ? all : kListed);
    if (size > 1) {
      for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
        shared.list[i] = __ldcg(&shared.lists->list[now][i]);
      }
      __syncthreads();
    }
    return n;
  }

  // A meeting after which thread i has bucket i of the sum of all blocks' histograms. Not in a
  // launch's first round.
  __device__ Bucket meet_histograms() {
    const uint32_t now = round_ % kRounds, i = threadIdx.x;
    __syncthreads();
    Bucket bucket{shared.count[i],
                  static_cast<uint64_t>(shared.mass_high[i]) << 32 | shared.mass_low[i]};
    if (size > 1) {
      if (bucket.count != 0) atomicAdd(&shared.lists->count[now][i], bucket.count);
      if (bucket.mass != 0) atomic_add(&shared.lists->mass[now][i], bucket.mass);
    }
    meet();
    if (size > 1)
      bucket = Bucket{__ldcg(&shared.lists->count[now][i]), __ldcg(&shared.lists->mass[now][i])};
    return bucket;
  }

 private:
  __device__ __forceinline__ uint32_t slice(uint32_t n) const {
    return ((n + size - 1) / size + 7) / 8 * 8;
  }

  __device__ __forceinline__ void clear(uint32_t round) {
    shared.lists->count[round][threadIdx.x] = 0;
    shared.lists->mass[round][threadIdx.x] = 0;
    if (threadIdx.x == 0) shared.boards->boards[round] = Board{};
  }

  // One thread per block.
  __device__ Board merge(Board& board) {
    const Board& mine = shared.mine;
    if (mine.best != 0) atomic_max(&board.best, mine.best);
    for (int i = 0; i < kSumParts; ++i) {
      if (mine.sum[i] != 0) atomic_add(&board.sum[i], mine.sum[i]);
    }
    if (mine.bad != 0) atomicOr(&board.bad, mine.bad);
    if (mine.max != 0) atomicMax(&board.max, mine.max);
    if (mine.min != 0) atomicMax(&board.min, mine.min);
    __threadfence();
    atomicAdd(&shared.boards->arrived, 1u);
    const uint32_t awaited = (round_ + 1) * size;
    while (load_shared_word(&shared.boards->arrived) < awaited) __nanosleep(32);
    __threadfence();
    Board all{};
    all.best = __ldcg(&board.best);
    for (int i = 0; i < kSumParts; ++i) all.sum[i] = __ldcg(&board.sum[i]);
    all.bad = __ldcg(&board.bad);
    all.max = __ldcg(&board.max);
    all.min = __ldcg(&board.min);
    all.listed = __ldcg(&board.listed);
    return all;
  }

  uint32_t round_ = 0;
};

}  // namespace inferlab::cuda
