#include "inferlab/growth.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace inferlab::cpu {
namespace {

// The surest `count` of `size` candidates, in order.
void surest(const float* confidence, int64_t size, int64_t count, std::vector<int32_t>& order) {
  order.resize(static_cast<size_t>(size));
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int32_t a, int32_t b) {
    return confidence[a] != confidence[b] ? confidence[a] > confidence[b] : a < b;
  });
}

void grow_one(const GrowLevelParams& p, int64_t b) {
  const int64_t count = p.parents * p.width;
  const int64_t before = p.level == 0 ? 0 : 1 + (p.level - 1) * p.width;  // expanded node of row 0
  const int64_t first = before * p.width;
  const int32_t* drawn = p.drawn + b * count;
  const float* scores = p.scores + b * count;
  int32_t* tokens = p.tokens + b * p.candidates + first;
  float* confidence = p.confidence + b * p.candidates;
  int32_t* expanded = p.expanded + b * p.expansions;
  if (p.level == 0) expanded[0] = -1;
  for (int64_t m = 0; m < p.parents; ++m) {
    const int32_t parent = expanded[before + m];
    const float path = parent < 0 ? 0.0f : confidence[parent];
    const float* row = scores + m * p.width;
    float total = 0.0f;
    for (int64_t i = 0; i < p.width; ++i) {
      if (drawn[m * p.width + i] >= 0) total += std::exp(row[i] - row[0]);
    }
    const float log_total = std::log(total);
    for (int64_t i = 0; i < p.width; ++i) {
      const int64_t at = m * p.width + i;
      const bool missing = drawn[at] < 0;
      tokens[at] = std::max(missing ? drawn[m * p.width] : drawn[at], 0);
      const float own = missing ? kNeverConfident : row[i] - row[0] - log_total;
      confidence[first + at] = path + std::min(own, 0.0f);
    }
  }
  if (p.next_tokens == nullptr) return;
  thread_local std::vector<int32_t> order;
  surest(confidence + first, count, p.width, order);
  for (int64_t i = 0; i < p.width; ++i) {
    const int64_t slot = 1 + p.level * p.width + i;
    const int64_t on = order[static_cast<size_t>(i)] / p.width;
    expanded[slot] = static_cast<int32_t>(first) + order[static_cast<size_t>(i)];
    p.next_tokens[b * p.width + i] = tokens[order[static_cast<size_t>(i)]];
    p.next_parents[b * p.width + i] = on;
    uint64_t* bits = p.next_ancestors + (b * p.width + i) * p.words;
    if (p.above == nullptr) {
      std::memset(bits, 0, static_cast<size_t>(p.words) * 8);
      bits[0] = 1;
    } else {
      std::memcpy(bits, p.above + (b * p.parents + on) * p.words, static_cast<size_t>(p.words) * 8);
    }
    bits[slot / 64] |= uint64_t{1} << (slot % 64);
  }
}

void tree_of_one(const GrowTreeParams& p, int64_t b) {
  thread_local std::vector<int32_t> order, place;
  const int64_t kept = p.nodes - 1;
  surest(p.confidence + b * p.candidates, p.candidates, kept, order);
  place.assign(static_cast<size_t>(p.candidates), 0);
  int32_t* tokens = p.tree_tokens + b * p.nodes;
  int32_t* parents = p.tree_parents + b * p.nodes;
  tokens[0] = p.roots[b];
  parents[0] = -1;
  for (int64_t i = 0; i < kept; ++i) {
    const int32_t candidate = order[static_cast<size_t>(i)];
    const int32_t parent = p.expanded[b * p.expansions + candidate / p.width];
    place[static_cast<size_t>(candidate)] = static_cast<int32_t>(i) + 1;
    tokens[i + 1] = p.tokens[b * p.candidates + candidate];
    parents[i + 1] = parent < 0 ? 0 : place[static_cast<size_t>(parent)];
  }
}

}  // namespace

Status grow_level(const GrowLevelParams& params) {
  parallel_for(params.batch, params.batch * params.parents * params.width * 64,
               [&](int64_t b) { grow_one(params, b); });
  return Status::kOk;
}

Status grow_tree(const GrowTreeParams& params) {
  parallel_for(params.batch, params.batch * params.candidates * 64,
               [&](int64_t b) { tree_of_one(params, b); });
  return Status::kOk;
}

}  // namespace inferlab::cpu
