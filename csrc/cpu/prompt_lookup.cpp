#include "inferlab/prompt_lookup.h"

#include <algorithm>
#include <stdexcept>

namespace inferlab::cpu {
namespace {

// The first `count` nodes below the root, which are a tree, as row `row`.
void put(const DraftTrie& trie, int32_t count, size_t row, DraftRows& rows) {
  int32_t* tokens = rows.tokens.data() + row * rows.width;
  int32_t* parents = rows.parents.data() + row * rows.width;
  std::vector<int32_t> depths(1 + count);
  for (int32_t n = 0; n <= count; ++n) {
    tokens[n] = trie.tokens[n];
    parents[n] = trie.parents[n];
    if (n > 0) depths[n] = depths[parents[n]] + 1;
    rows.is_chain = rows.is_chain && parents[n] == n - 1;
  }
  rows.depths.push_back(*std::max_element(depths.begin(), depths.end()));
  rows.counts.push_back(1 + count);
  const auto next = static_cast<size_t>(1 + count);
  rows.left_out.emplace_back(next < trie.tokens.size() ? trie.parents[next] : -1,
                             next < trie.tokens.size() ? trie.tokens[next] : 0);
}

}  // namespace

int64_t PromptLookup::length(int64_t text) const {
  const auto found = texts_.find(text);
  return found == texts_.end() ? 0 : static_cast<int64_t>(found->second.own.text().size());
}

void PromptLookup::read(int64_t text, const int32_t* tokens, int64_t count) {
  Text& known = texts_[text];
  known.own.extend(tokens, count);
  if (corpus_ == nullptr) return;
  for (int64_t i = 0; i < count; ++i) {
    known.in_corpus = corpus_->follow(known.in_corpus, tokens[i]);
  }
}

// The nodes of what was offered last that the text went through since; `known`: of how many nodes,
// the root included, that can be said. Where the text has not come to a leaf or left the tree yet,
// of those that are no deeper than it came.
std::vector<int> PromptLookup::follow(const Text& text, size_t& known) {
  const DraftTrie& offered = text.offered;
  const std::vector<int32_t>& tokens = text.own.text();
  const size_t count = offered.tokens.size();
  std::vector<int> walk;
  int32_t at = 0;
  size_t next = text.offered_at;
  for (size_t node = 1; node < count; ++node) {  // parents stand before their children
    if (offered.parents[node] != at) continue;
    if (next == tokens.size()) {
      known = node;
      return walk;
    }
    if (offered.tokens[node] != tokens[next]) continue;
    walk.push_back(static_cast<int>(node));
    at = static_cast<int32_t>(node);
    ++next;
  }
  known = count;
  return walk;
}

DraftRows PromptLookup::draft(const std::vector<int64_t>& texts, int32_t depth, int32_t nodes,
                              const DraftJudge* judge) {
  DraftLimits limits = limits_;
  limits.depth = depth;
  limits.nodes = nodes;
  std::vector<DraftTrie> tries;
  std::vector<int> counts;
  for (const int64_t text : texts) {
    const Text& known = texts_.at(text);
    tries.push_back(draft_trie({&known.own, corpus_, known.in_corpus}, limits));
    counts.push_back(static_cast<int>(tries.back().tokens.size()) - 1);
  }
  if (judge != nullptr) {
    DraftJudge::Worth before, worth;
    std::vector<std::vector<int>> accepted;
    for (size_t row = 0; row < tries.size(); ++row) {
      Text& text = texts_.at(texts[row]);
      size_t known = 0;
      accepted.push_back(follow(text, known));
      const auto& then = text.offered.worth;
      before.emplace_back(then.begin() + std::min<size_t>(1, known), then.begin() + known);
      worth.emplace_back(tries[row].worth.begin() + 1, tries[row].worth.end());
      text.offered = tries[row];
      text.offered_at = text.own.text().size();
    }
    judge->followed(before, accepted);
    const std::vector<int> kept = judge->keep(worth);
    if (kept.size() != counts.size()) throw std::invalid_argument("as many counts as trees");
    for (size_t row = 0; row < counts.size(); ++row) {
      counts[row] = std::clamp(kept[row], 0, counts[row]);
    }
  }
  DraftRows rows;
  for (const int count : counts) rows.width = std::max<int64_t>(rows.width, 1 + count);
  rows.tokens.resize(tries.size() * rows.width);
  rows.parents.assign(tries.size() * rows.width, -2);
  for (size_t row = 0; row < tries.size(); ++row) put(tries[row], counts[row], row, rows);
  return rows;
}

}  // namespace inferlab::cpu
