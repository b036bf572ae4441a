#include "inferlab/growth.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace inferlab::cpu {
namespace {

// The log of a drawn token's softmax among its siblings' scores, and its stand-in where there is
// none.
struct Sibling {
  int32_t token;
  float confidence;
};

template <typename Use>
void siblings(const int32_t* drawn, const float* scores, int64_t width, const Use& use) {
  float total = 0.0f;
  for (int64_t i = 0; i < width; ++i) {
    if (drawn[i] >= 0) total += std::exp(scores[i] - scores[0]);
  }
  const float log_total = std::log(total);
  for (int64_t i = 0; i < width; ++i) {
    const bool missing = drawn[i] < 0;
    const float own = missing ? kNeverConfident : scores[i] - scores[0] - log_total;
    use(i, Sibling{std::max(missing ? drawn[0] : drawn[i], 0), std::min(own, 0.0f)});
  }
}

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
    const int64_t at = m * p.width;
    siblings(drawn + at, scores + at, p.width, [&](int64_t i, Sibling child) {
      tokens[at + i] = child.token;
      confidence[first + at + i] = path + child.confidence;
    });
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
  float* confidence = p.tree_confidence + b * p.nodes;
  tokens[0] = p.roots[b];
  parents[0] = -1;
  confidence[0] = 0.0f;
  for (int64_t i = 0; i < kept; ++i) {
    const int32_t candidate = order[static_cast<size_t>(i)];
    const int32_t parent = p.expanded[b * p.expansions + candidate / p.width];
    place[static_cast<size_t>(candidate)] = static_cast<int32_t>(i) + 1;
    tokens[i + 1] = p.tokens[b * p.candidates + candidate];
    parents[i + 1] = parent < 0 ? 0 : place[static_cast<size_t>(parent)];
    confidence[i + 1] = p.confidence[b * p.candidates + candidate];
  }
}

// A node that hangs on the tree but is not taken yet.
struct Bud {
  float confidence;  // of the path
  int32_t order;     // among all buds: ties go to the first
  int32_t parent;    // node of the tree
  int32_t depth, rank;
  bool operator<(const Bud& other) const {
    return confidence != other.confidence ? confidence < other.confidence : order > other.order;
  }
};

void offsets_of_one(const GrowOffsetsParams& p, int64_t b) {
  thread_local std::vector<Sibling> ranked;
  thread_local std::vector<Bud> buds;  // a heap
  ranked.resize(static_cast<size_t>(p.depth * p.width));
  for (int64_t d = 0; d < p.depth; ++d) {
    const int64_t at = (b * p.depth + d) * p.width;
    siblings(p.drawn + at, p.scores + at, p.width, [&](int64_t i, Sibling child) {
      ranked[static_cast<size_t>(d * p.width + i)] = child;
    });
  }
  int32_t* tokens = p.tree_tokens + b * p.nodes;
  int32_t* parents = p.tree_parents + b * p.nodes;
  float* path = p.tree_confidence + b * p.nodes;
  tokens[0] = p.roots[b];
  parents[0] = -1;
  path[0] = 0.0f;
  buds.clear();
  int32_t order = 0;
  const auto bud = [&](int32_t parent, int32_t depth, int32_t rank) {
    if (depth == p.depth || rank == p.width) return;
    const Sibling& s = ranked[static_cast<size_t>(depth * p.width + rank)];
    const float sure = path[parent] + s.confidence;
    buds.push_back({sure, order++, parent, depth, rank});
    std::push_heap(buds.begin(), buds.end());
  };
  bud(0, 0, 0);
  for (int32_t node = 1; node < p.nodes; ++node) {
    std::pop_heap(buds.begin(), buds.end());
    const Bud taken = buds.back();
    buds.pop_back();
    tokens[node] = ranked[static_cast<size_t>(taken.depth * p.width + taken.rank)].token;
    parents[node] = taken.parent;
    path[node] = taken.confidence;
    bud(taken.parent, taken.depth, taken.rank + 1);
    bud(node, taken.depth + 1, 0);
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

Status grow_offsets(const GrowOffsetsParams& params) {
  parallel_for(params.batch, params.batch * (params.nodes + params.depth * params.width) * 64,
               [&](int64_t b) { offsets_of_one(params, b); });
  return Status::kOk;
}

}  // namespace inferlab::cpu
