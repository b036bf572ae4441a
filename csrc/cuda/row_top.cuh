// The best n tokens of a row in order, for any n: up to kTop at a time, each time those below the
// last one. A block appends to a list what may be among the best, and sorts and cuts the list when
// it is full, which raises the score to beat.
#pragma once

#include "row_filters.cuh"

namespace inferlab::cuda {

constexpr int kTop = 256;
static_assert(kTop + kThreads <= kListed, "a list has room for one key of each thread");

// In shared.list: complements of rank keys, so that the best sorts first.
class TopList {
 public:
  // Keeps the best `want` <= kTop of the keys below `below`.
  __device__ TopList(RowShared& shared, int want, uint64_t below)
      : shared_(shared), want_(want), below_(below) {
    __syncthreads();  // the list may still be read
    set_listed();
  }

  // What a score must reach to be of interest.
  __device__ __forceinline__ float floor() const {
    return floor_ == 0 ? -infinity() : key_value(floor_);
  }

  // All threads together: the keys key_at(0), ..., key_at(kCount - 1); 0 is nothing.
  template <int kCount, typename F>
  __device__ __forceinline__ void offer(F key_at) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < kCount; ++i) any |= wanted(key_at(i));
    if (!__syncthreads_or(any)) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (count_ + kThreads > kListed) tidy();
      const uint64_t key = key_at(i);
      if (wanted(key)) shared_.list[atomicAdd(&shared_.mine.listed, 1u)] = ~key;
      __syncthreads();
      count_ = static_cast<int>(shared_.mine.listed);
      __syncthreads();
    }
  }

  // Leaves the best in order; returns how many there are.
  __device__ int tidy() {
    block_sort(shared_.list, count_);
    if (count_ >= want_) {
      count_ = want_;
      floor_ = ~shared_.list[want_ - 1];
    }
    set_listed();
    return count_;
  }

  // After tidy(); 0 where there is none.
  __device__ __forceinline__ uint64_t key(int i) const { return i < count_ ? ~shared_.list[i] : 0; }

 private:
  __device__ __forceinline__ bool wanted(uint64_t key) const {
    return key > floor_ && key < below_;
  }
  __device__ __forceinline__ void set_listed() {
    if (threadIdx.x == 0) shared_.mine.listed = static_cast<uint32_t>(count_);
    __syncthreads();
  }

  RowShared& shared_;
  int want_, count_ = 0;
  uint64_t below_, floor_ = 0;
};

// out[0, n): the best tokens, then -1; scores [n] or null: what they were chosen by, then -inf.
// `merged` [size, kTop] is the group's, in the workspace.
template <typename T>
__device__ void choose_many(Group& group, const Row<T>& row, const Choice& choice,
                            uint32_t position, uint32_t purpose, int n, uint64_t* merged,
                            int32_t* out, float* scores_out) {
  constexpr int kPer = Row<T>::kPer;
  const int me = static_cast<int>(threadIdx.x);
  const Draw draw(choice, position, purpose);
  const Extent extent = scan(group, row);
  Cut cut = keep_all();
  if (extent.valid && choice.filters()) cut = find_cut(group, row, choice, extent);
  int done = 0;
  uint64_t below = ~uint64_t{0};
  for (bool more = extent.valid; more && done < n;) {
    const int want = n - done < kTop ? n - done : kTop;
    TopList own(group.shared, want, below);
    for_vectors(group, row, [&](uint32_t first, const float (&x)[kPer]) {
      float scores[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) scores[i] = choice.greedy ? x[i] : -infinity();
      if (!choice.greedy) {
        draw.near(x, first, own.floor(), [&](uint32_t token, float l, float score) {
          const bool kept = cut.keeps(l, token);
#pragma unroll
          for (int i = 0; i < kPer; ++i) {
            if (kept && first + i == token) scores[i] = score;
          }
        });
      }
      own.offer<kPer>([&](int i) {
        return scores[i] > -infinity() ? rank_key(scores[i], first + i) : uint64_t{0};
      });
    });
    int count = own.tidy();
    if (group.size > 1) {
      if (me < want) merged[group.rank * kTop + me] = own.key(me);
      group.meet();
      TopList all(group.shared, want, below);
      const int total = static_cast<int>(group.size) * want;
      for (int base = 0; base < total; base += kThreads) {
        const int at = base + me;
        const uint64_t key =
            at < total ? __ldcg(&merged[at / want * kTop + at % want]) : uint64_t{0};
        all.offer<1>([&](int) { return key; });
      }
      count = all.tidy();
    }
    const uint64_t* list = group.shared.list;
    if (group.leads() && me < count) {
      out[done + me] = key_token(~list[me]);
      if (scores_out != nullptr) scores_out[done + me] = key_value(~list[me]);
    }
    if (count > 0) below = ~list[count - 1];
    done += count;
    more = count == want;
    if (more && done < n) group.meet();  // before `merged` is written again
  }
  if (!group.leads()) return;
  for (int i = done + me; i < n; i += kThreads) {
    out[i] = -1;
    if (scores_out != nullptr) scores_out[i] = -infinity();
  }
}

}  // namespace inferlab::cuda
