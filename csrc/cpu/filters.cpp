// Top-k, top-p and min-p as one cut in the ranking "logit descending, then token ascending".
// Nothing is sorted but the few tokens around the cut: block maxima bound the k-th largest logit
// from below, and masses are summed by buckets. Masses of candidates are integers, so their order
// is free.
#include <cmath>

#include "row.h"

namespace inferlab::cpu {
namespace {

constexpr int64_t kSortAtOnce = 768;

Cut stricter(Cut a, Cut b) {
  if (a.logit != b.logit) return a.logit > b.logit ? a : b;
  return a.token < b.token ? a : b;
}

Cut cut_at(uint64_t key) { return Cut{key_value(key), key_token(key)}; }

uint64_t* key_buffer(Workspace& ws, int64_t size) {
  if (static_cast<int64_t>(ws.keys.size()) < size) ws.keys.resize(static_cast<size_t>(size));
  return ws.keys.data();
}

// The smallest logit whose weight is at least min_p, by bisection over the floats.
float min_p_logit(float max, const Softmax& softmax, float min_p) {
  uint64_t low = rank_key(kLowest, 0) >> 32, high = rank_key(max, 0) >> 32;
  while (low < high) {
    const uint64_t mid = low + (high - low) / 2;
    const float z = (key_value(mid << 32) - max) * softmax.inv_temperature;
    if (INFERLAB_DISPATCH(exp_one, z) >= min_p) {
      high = mid;
    } else {
      low = mid + 1;
    }
  }
  return key_value(high << 32);
}

// A logit that at least k elements reach (if so many are finite), and hardly more than twice k.
float top_k_bound(const Row& row, float max, int64_t k, Workspace& ws) {
  const int64_t blocks = (row.size + row.block - 1) / row.block;
  ws.order.assign(row.block_max, row.block_max + blocks);
  const int64_t nth = std::min(k, blocks) - 1;
  std::nth_element(ws.order.begin(), ws.order.begin() + nth, ws.order.end(), std::greater<float>());
  float low = std::max(ws.order[static_cast<size_t>(nth)], kLowest);
  if (k <= blocks) return low;
  // More than one per block: go down until k are found, then half-way up while there are too many.
  float high = max;
  float step = std::max(max - low, 1.0f);
  while (low > kLowest && INFERLAB_DISPATCH(count_at_least, row, low) < k) {
    high = low;
    low = std::max(low - step, kLowest);
    step *= 2.0f;
  }
  for (int i = 0; i < 12; ++i) {
    const float mid = low + 0.5f * (high - low);
    if (!(mid > low && mid < high)) break;
    const int64_t count = INFERLAB_DISPATCH(count_at_least, row, mid);
    (count >= k ? low : high) = mid;
    if (count >= k && count <= 2 * k) break;
  }
  return low;
}

// Brings the keys of the k best to the front; returns how many there are (k, or all finite ones).
int64_t select_top_k(const Row& row, float max, int64_t k, Workspace& ws) {
  uint64_t* keys = key_buffer(ws, row.size);
  const float least = top_k_bound(row, max, k, ws);
  const int64_t count = INFERLAB_DISPATCH(collect_keys, row, least, keys);
  if (count <= k) return count;
  std::nth_element(keys, keys + k - 1, keys + count, std::greater<uint64_t>());
  return k;
}

uint64_t total_mass(const uint64_t* keys, int64_t n, const Softmax& softmax, Workspace& ws) {
  if (static_cast<int64_t>(ws.masses.size()) < n) ws.masses.resize(static_cast<size_t>(n));
  INFERLAB_DISPATCH(key_masses, keys, n, softmax, ws.masses.data());
  uint64_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += ws.masses[static_cast<size_t>(i)];
  return sum;
}

// The key at which the ranking's prefix reaches `target`; the last one where none does. ws.masses
// holds the keys' masses.
Cut mass_cut(uint64_t* keys, int64_t n, uint64_t target, const Softmax& softmax, Workspace& ws) {
  uint64_t* masses = ws.masses.data();
  while (n > kSortAtOnce) {
    float high = -kInf, low = kInf;
    for (int64_t i = 0; i < n; ++i) {
      const float l = key_value(keys[i]);
      high = std::max(high, l);
      low = std::min(low, l);
    }
    constexpr int kBuckets = 512;
    const float scale = (kBuckets - 1) / (high - low);
    if (!(scale < kInf)) break;  // all equal, or next to it
    const auto bucket = [&](uint64_t key) {
      return static_cast<int>((high - key_value(key)) * scale);
    };
    uint64_t mass[kBuckets] = {};
    for (int64_t i = 0; i < n; ++i) mass[bucket(keys[i])] += masses[i];
    uint64_t above = 0;
    int chosen = 0;
    while (chosen < kBuckets && above + mass[chosen] < target) above += mass[chosen++];
    if (chosen == kBuckets) return cut_at(*std::min_element(keys, keys + n));
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (bucket(keys[i]) != chosen) continue;
      keys[count] = keys[i];
      masses[count++] = masses[i];
    }
    target -= above;
    if (count == n) break;
    n = count;
  }
  std::sort(keys, keys + n, std::greater<uint64_t>());
  INFERLAB_DISPATCH(key_masses, keys, n, softmax, masses);
  int64_t last = 0;
  for (uint64_t sum = masses[0]; sum < target && last + 1 < n; sum += masses[last]) ++last;
  return cut_at(keys[last]);
}

// body(begin, end, chunk) for each chunk of the row, on the threads if `threaded`.
template <typename Body>
void for_chunks(const Row& row, bool threaded, Body body) {
  const int64_t chunks = (row.size + kChunk - 1) / kChunk;
  const auto one = [&](int64_t c) { body(c * kChunk, std::min(row.size, (c + 1) * kChunk), c); };
  if (threaded) {
    parallel_for(chunks, row.size * 4, one);
  } else {
    for (int64_t c = 0; c < chunks; ++c) one(c);
  }
}

// Most rows have most of their mass near the top: those few tokens are tried first. Else one pass
// adds up masses by bucket, and only the bucket that the cut falls into is looked at closely.
Cut top_p_cut(const Row& row, const Softmax& softmax, float top_p, Workspace& ws, bool threaded) {
  std::atomic<uint64_t> all{0};
  for_chunks(row, threaded, [&](int64_t begin, int64_t end, int64_t) {
    all.fetch_add(INFERLAB_DISPATCH(sum_masses, row, begin, end, softmax));
  });
  uint64_t target = mass_target(top_p, all.load());
  uint64_t* keys = key_buffer(ws, row.size);
  const float near_top = std::max(softmax.max - 4.0f / softmax.inv_temperature, kLowest);
  const int64_t near_count = INFERLAB_DISPATCH(collect_keys, row, near_top, keys);
  if (total_mass(keys, near_count, softmax, ws) >= target) {
    return mass_cut(keys, near_count, target, softmax, ws);
  }
  const int64_t chunks = (row.size + kChunk - 1) / kChunk;
  ws.histograms.assign(static_cast<size_t>(chunks * kMassBuckets), 0);
  uint64_t* mass = ws.histograms.data();
  for_chunks(row, threaded, [&](int64_t begin, int64_t end, int64_t c) {
    INFERLAB_DISPATCH(mass_histogram, row, begin, end, softmax, mass + c * kMassBuckets);
  });
  for (int64_t i = kMassBuckets; i < chunks * kMassBuckets; ++i) mass[i % kMassBuckets] += mass[i];
  int bucket = 0;
  while (bucket + 1 < kMassBuckets && mass[bucket] < target) target -= mass[bucket++];
  const int64_t n = INFERLAB_DISPATCH(collect_bucket, row, softmax, bucket, keys);
  if (n == 0) return kKeepAll;
  total_mass(keys, n, softmax, ws);
  return mass_cut(keys, n, target, softmax, ws);
}

}  // namespace

Cut top_k_cut(const Row& row, float max, int64_t k, Workspace& ws) {
  if (k >= row.size) return kKeepAll;
  const int64_t n = select_top_k(row, max, k, ws);
  return n < k ? kKeepAll : cut_at(*std::min_element(ws.keys.data(), ws.keys.data() + n));
}

Cut find_cut(const Row& row, float max, const Choice& choice, Workspace& ws, bool threaded) {
  const Softmax softmax = choice.softmax(max);
  Cut cut = kKeepAll;
  if (choice.min_p > 0.0f) cut.logit = min_p_logit(max, softmax, choice.min_p);
  if (choice.top_k > 0 && choice.top_k < row.size) {
    const int64_t n = select_top_k(row, max, choice.top_k, ws);
    uint64_t* keys = ws.keys.data();
    if (n == choice.top_k) cut = stricter(cut, cut_at(*std::min_element(keys, keys + n)));
    if (choice.top_p < 1.0f) {
      const uint64_t target = mass_target(choice.top_p, total_mass(keys, n, softmax, ws));
      cut = stricter(cut, mass_cut(keys, n, target, softmax, ws));
    }
  } else if (choice.top_p < 1.0f) {
    cut = stricter(cut, top_p_cut(row, softmax, choice.top_p, ws, threaded));
  }
  return cut;
}

}  // namespace inferlab::cpu
