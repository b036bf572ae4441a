// Top-k, top-p and min-p as one cut in the ranking "logit descending, then token ascending".
//
// A token's place in the ranking is an integer: (steps below the largest logit) * size + token. The
// group counts tokens and adds up masses (weights.h) in 512 buckets of places, sees in which bucket
// the k-th token lies or the mass reaches top_p, and looks into that bucket again, until it holds
// no more than kListed tokens. Those are listed, every block sorts them, and the cut is one of
// them. Rounds (meetings): one histogram and one list for most rows. The first buckets are linear
// in the logit and end 8 * temperature below the largest (e^-8 of its weight), the last one taking
// the rest: most rows have most of their mass there, and the many small tokens go through no
// atomics.
#pragma once

#include "row_draw.cuh"

namespace inferlab::cuda {

// Tokens of one row as integers that ascend as the ranking descends.
struct Places {
  uint32_t top;  // of the largest element: ordered_bits, shifted
  int spare;     // by this
  uint32_t size;

  __device__ __forceinline__ uint64_t place(float l, uint32_t token) const {
    return static_cast<uint64_t>(top - (ordered_bits(l) >> spare)) * size + token;
  }
  __device__ __forceinline__ float value(uint32_t ordered) const {
    const uint32_t bits = ordered << spare;
    return from_ordered(bits & 0x80000000u ? bits : bits | ((1u << spare) - 1));
  }
  __device__ __forceinline__ uint32_t ordered(uint64_t place) const {
    return top - static_cast<uint32_t>(place / size);
  }
  __device__ __forceinline__ Cut cut(uint64_t place) const {
    return Cut{value(ordered(place)), static_cast<uint32_t>(place % size)};
  }
};

// Where a cut is looked for.
struct Search {
  bool open;             // false: there is nothing to look for
  uint32_t k;            // the k-th token (0: not by count)
  uint64_t target;       // the token at which masses reach this (0: not by mass)
  uint64_t first, last;  // places that may be it
  uint32_t count_above;  // tokens before the first of them
  uint64_t mass_above;   // their mass
};

// How places fall into buckets: linear in the logit, or in the place itself.
struct Buckets {
  bool linear;
  float top, scale;
  uint64_t first;
  int shift;

  __device__ __forceinline__ uint32_t by_logit(float l) const {
    return static_cast<uint32_t>(fminf((top - l) * scale, static_cast<float>(kBuckets - 1)));
  }
  __device__ __forceinline__ uint32_t of(float l, uint64_t place) const {
    return linear ? by_logit(l) : static_cast<uint32_t>((place - first) >> shift);
  }
};

// Buckets of equal width from `top` down over `range`; the last one takes what is below.
__device__ __forceinline__ Buckets linear_buckets(float top, float range) {
  const float scale = range > 0.0f ? fminf((kBuckets - 1) / range, 3e38f) : 0.0f;
  return Buckets{true, top, scale, 0, 0};
}
__device__ __forceinline__ Buckets place_buckets(uint64_t first, uint64_t last) {
  const int bits = 64 - __clzll(static_cast<long long>(last - first));
  return Buckets{false, 0.0f, 0.0f, first, bits > 9 ? bits - 9 : 0};
}
static_assert(kBuckets == 512, "place_buckets leaves 9 bits");

template <typename T>
class Filter {
 public:
  static constexpr int kPer = Row<T>::kPer;

  // The row has been scanned and is valid.
  __device__ Filter(Group& group, const Row<T>& row, const Choice& choice, const Extent& extent)
      : group_(group), row_(row), choice_(choice), extent_(extent), cut_(keep_all()) {
    places_ = Places{ordered_bits(extent.max) >> row.spare_bits(), row.spare_bits(), row.size};
    if (choice.min_p > 0.0f) {
      // The smallest logit whose weight reaches min_p; weight_exp is monotone.
      const uint32_t least =
          first_where(ordered_bits(lowest()), ordered_bits(extent.max),
                      [&](uint32_t o) { return weight(from_ordered(o)) >= choice.min_p; });
      cut_.logit = from_ordered(least);
    }
  }

  // Relative to the largest.
  __device__ __forceinline__ float weight(float l) const {
    return weight_exp((l - extent_.max) * choice_.inv_temperature);
  }

  // The last token kept, as far as it is known: what min-p says before anything is settled.
  __device__ __forceinline__ const Cut& cut() const { return cut_; }

  // Rounds until the cut lies among few enough places to list them.
  __device__ Search narrow() {
    uint64_t target = 0;
    if (choice_.top_k > 0) {
      Search s = everywhere();
      s.k = choice_.top_k;
      narrow(s, true);
      const bool alone = choice_.top_p >= 1.0f;
      if (!s.open && alone) return s;
      if (s.open) {
        if (alone || s.first == 0) return s;
        // Too many for one list: first the k-th token, for the mass down to it.
        list(s, [](uint32_t, const float (&)[kPer]) {});
        meet_and_sort();
        target = settle_count(s);
      }
    }
    Search s = everywhere();
    if (choice_.top_p >= 1.0f) {
      s.open = false;
      return s;
    }
    s.target = target;
    narrow(s, false);
    return s;
  }

  // Lists the places of s; above(first token, elements) gets those before them, the others as -inf.
  template <typename F>
  __device__ __forceinline__ void list(const Search& s, F above) {
    for_vectors(group_, row_, [&](uint32_t first, const float (&x)[kPer]) {
      float sure[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        sure[i] = -infinity();
        if (!(x[i] > -infinity())) continue;
        const uint64_t place = places_.place(x[i], first + i);
        if (place < s.first) sure[i] = x[i];
        if (place < s.first || place > s.last) continue;
        const uint32_t at = atomicAdd(&group_.shared.mine.listed, 1u);
        if (at < kListed) group_.shared.list[at] = place;
      }
      above(first, sure);
    });
  }

  // Meets, and finds the cut among the listed.
  __device__ void settle(const Search& s) {
    meet_and_sort();
    const uint64_t target = s.k > 0 ? settle_count(s) : s.target;
    if (choice_.top_p < 1.0f) settle_mass(s, target);
  }

  // Calls f(token, logit) on this thread's part of the listed that are kept; all blocks of a group
  // go over all of them.
  template <typename F>
  __device__ __forceinline__ void for_listed(F f) const {
    for (int i = static_cast<int>(threadIdx.x); i < listed_; i += kThreads) {
      const Cut at = places_.cut(group_.shared.list[i]);
      if (cut_.keeps(at.logit, at.token)) f(at.token, at.logit);
    }
  }

 private:
  __device__ __forceinline__ Search everywhere() const {
    const uint64_t last =
        static_cast<uint64_t>(places_.top - (ordered_bits(extent_.min) >> places_.spare)) *
            places_.size +
        (places_.size - 1);
    return Search{true, 0, 0, 0, last, 0, 0};
  }

  __device__ __forceinline__ uint64_t mass(float l) const { return mass_of(weight(l)); }

  __device__ void narrow(Search& s, bool by_count) {
    const float height = extent_.max - extent_.min;
    float range = choice_.top_p < 1.0f ? 8.0f * choice_.temperature : 0.0f;
    if (by_count) range = fmaxf(range, 0.25f * height);
    Buckets buckets = linear_buckets(extent_.max, fminf(range, height));
    for (bool first = true;; first = false) {
      const Crossing c = cross(s, buckets, by_count, first);
      if (c.index == kBuckets) {
        s.open = false;
        return;
      }
      const bool rest = first && c.index == kBuckets - 1;
      look_into(s, buckets, c.index);
      s.count_above += c.count_before;
      s.mass_above += c.mass_before;
      if (by_count && choice_.top_p < 1.0f && s.count_above + c.count <= kListed) {
        s.first = 0;  // all down to the k-th fit: top-p can be settled with them
        s.count_above = 0;
        s.mass_above = 0;
        return;
      }
      if (c.count <= kListed || s.first >= s.last) return;  // one place: whatever is counted
      if (rest) {
        const float top = places_.value(places_.ordered(s.first));
        buckets = linear_buckets(top, top - extent_.min);
      } else {
        buckets = place_buckets(s.first, s.last);
      }
    }
  }

  // One histogram of the places of s: the bucket in which the count reaches k, or the mass the
  // target. `first`: this is about all tokens, so where the target is open, it is set.
  __device__ Crossing cross(Search& s, const Buckets& buckets, bool by_count, bool first) {
    RowShared& shared = group_.shared;
    const Bucket mine = histogram(s, buckets);
    if (threadIdx.x == 0) shared.crossing.index = kBuckets;
    const uint64_t count = block_prefix_sum(mine.count, shared.sums);
    const uint64_t mass = block_prefix_sum(mine.mass, shared.sums);
    if (!by_count && first && s.target == 0) {
      if (threadIdx.x == kThreads - 1) shared.total = mass;
      __syncthreads();
      s.target = mass_target(choice_.top_p, shared.total);
    }
    const uint64_t reach = by_count ? s.k - s.count_above : s.target - s.mass_above;
    const uint64_t sum = by_count ? count : mass, own = by_count ? mine.count : mine.mass;
    if (sum >= reach && sum - own < reach) {
      shared.crossing = Crossing{threadIdx.x, mine.count, static_cast<uint32_t>(count) - mine.count,
                                 mass - mine.mass};
    }
    __syncthreads();
    return shared.crossing;
  }

  __device__ Bucket histogram(const Search& s, const Buckets& buckets) {
    RowShared& shared = group_.shared;
    const bool with_mass = choice_.top_p < 1.0f;
    shared.count[threadIdx.x] = 0;
    shared.mass_low[threadIdx.x] = 0;
    shared.mass_high[threadIdx.x] = 0;
    __syncthreads();
    uint32_t rest_count = 0;
    uint64_t rest_mass = 0;
    for_vectors(group_, row_, [&](uint32_t first, const float (&x)[kPer]) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        if (!(x[i] > -infinity())) continue;
        const uint64_t place = places_.place(x[i], first + i);
        if (place < s.first || place > s.last) continue;
        const uint64_t m = with_mass ? mass(x[i]) : 0;
        const uint32_t bucket = buckets.of(x[i], place);
        if (bucket < kBuckets - 1) {
          atomicAdd(&shared.count[bucket], 1u);
          if (m != 0) add_mass(bucket, m);
        } else {
          ++rest_count;
          rest_mass += m;
        }
      }
    });
    rest_count = __reduce_add_sync(kAllLanes, rest_count);
    rest_mass = warp_sum(rest_mass);
    if (lane_index() == 0 && rest_count > 0) {
      atomicAdd(&shared.count[kBuckets - 1], rest_count);
      add_mass(kBuckets - 1, rest_mass);
    }
    return group_.meet_histograms();
  }

  // 64 bits in two native atomics: whoever makes the low word wrap carries.
  __device__ __forceinline__ void add_mass(uint32_t bucket, uint64_t m) {
    const uint32_t low = static_cast<uint32_t>(m);
    const uint32_t old = atomicAdd(&group_.shared.mass_low[bucket], low);
    const uint32_t carry = old + low < old ? 1u : 0u;
    const uint32_t high = static_cast<uint32_t>(m >> 32) + carry;
    if (high != 0) atomicAdd(&group_.shared.mass_high[bucket], high);
  }

  // Leaves the places of one bucket in s.
  __device__ void look_into(Search& s, const Buckets& buckets, uint32_t bucket) const {
    uint64_t first, last;
    if (buckets.linear) {
      const uint32_t low = places_.ordered(s.last), high = places_.ordered(s.first);
      const auto edge = [&](uint32_t b) {  // the smallest logit down to which the buckets are <= b
        return first_where(low, high,
                           [&](uint32_t o) { return buckets.by_logit(places_.value(o)) <= b; });
      };
      last = static_cast<uint64_t>(places_.top - edge(bucket) + 1) * places_.size - 1;
      first = bucket == 0
                  ? s.first
                  : static_cast<uint64_t>(places_.top - edge(bucket - 1) + 1) * places_.size;
    } else {
      first = buckets.first + (static_cast<uint64_t>(bucket) << buckets.shift);
      last = first + ((uint64_t{1} << buckets.shift) - 1);
    }
    if (first > s.first) s.first = first;
    if (last < s.last) s.last = last;
  }

  __device__ void meet_and_sort() {
    listed_ = group_.meet_lists();
    block_sort(group_.shared.list, listed_);
  }

  // Cuts at the k-th token. Returns what top-p has to reach of the mass down to it.
  __device__ uint64_t settle_count(const Search& s) {
    RowShared& shared = group_.shared;
    const uint32_t nth = s.k - s.count_above - 1;  // of the listed
    cut_ = stricter(cut_, places_.cut(shared.list[nth % kListed]));
    if (choice_.top_p >= 1.0f) return 0;
    const uint64_t pair[2] = {listed_mass(0), listed_mass(1)};
    const uint64_t sum = s.mass_above + block_prefix_sum(pair[0] + pair[1], shared.sums);
    if (threadIdx.x == nth / 2) shared.total = nth % 2 != 0 ? sum : sum - pair[1];
    __syncthreads();
    return mass_target(choice_.top_p, shared.total);
  }

  __device__ void settle_mass(const Search& s, uint64_t target) {
    RowShared& shared = group_.shared;
    const uint64_t pair[2] = {listed_mass(0), listed_mass(1)};
    const uint64_t sum = s.mass_above + block_prefix_sum(pair[0] + pair[1], shared.sums);
    const uint64_t before = sum - pair[0] - pair[1];
    if (sum >= target && before < target) {
      shared.crossing.index = 2 * threadIdx.x + (before + pair[0] >= target ? 0 : 1);
    }
    __syncthreads();
    cut_ = stricter(cut_, places_.cut(shared.list[shared.crossing.index % kListed]));
  }

  // Of entry 2 * thread + i.
  __device__ __forceinline__ uint64_t listed_mass(int i) const {
    const int at = 2 * static_cast<int>(threadIdx.x) + i;
    return at < listed_ ? mass(places_.value(places_.ordered(group_.shared.list[at]))) : 0;
  }

  Group& group_;
  const Row<T>& row_;
  const Choice& choice_;
  Extent extent_;
  Cut cut_;
  Places places_;
  int listed_ = 0;
};

// The last token that top-k, top-p and min-p keep of a scanned, valid row.
template <typename T>
__device__ Cut find_cut(Group& group, const Row<T>& row, const Choice& choice,
                        const Extent& extent) {
  Filter<T> filter(group, row, choice, extent);
  const Search last = filter.narrow();
  if (last.open) {
    filter.list(last, [](uint32_t, const float (&)[Row<T>::kPer]) {});
    filter.settle(last);
  }
  return filter.cut();
}

// The token of the largest score among those kept; -1: nothing can be sampled from this row. One
// meeting without filters; with them usually three: scan, histogram, and the list together with the
// draw from what is kept for sure.
template <typename T>
__device__ int32_t choose(Group& group, const Row<T>& row, const Choice& choice, uint32_t position,
                          uint32_t purpose) {
  const Draw draw(choice, position, purpose);
  if (!choice.filters()) return choose_unfiltered(group, row, choice, draw);
  const Extent extent = scan(group, row);
  if (!extent.valid) return -1;
  Filter<T> filter(group, row, choice, extent);
  const Search last = filter.narrow();
  Best best;
  float reached = extent.max * choice.inv_temperature + kLeastGumbel;  // the largest is kept
  const auto offer = [&](uint32_t first, const float (&x)[Row<T>::kPer]) {
    best.offer_noisy(x, first, draw, choice, filter.cut(), reached);
  };
  if (last.open) {
    filter.list(last, offer);
    group.tell_best(best.key(), false);
    filter.settle(last);
    filter.for_listed([&](uint32_t token, float l) { best.offer(draw.score(l, token), token); });
    const uint64_t own = block_max(best.key(), group.shared.sums);
    return token_of(own > group.shared.seen.best ? own : group.shared.seen.best);
  }
  for_vectors(group, row, offer);
  group.tell_best(best.key(), false);
  return token_of(group.meet().best);
}

}  // namespace inferlab::cuda
