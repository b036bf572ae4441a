// PromptLookup: the texts under way, each as a suffix automaton, and drafts for a batch of them.
#pragma once

#include <cstdint>
#include <functional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "inferlab/suffix_automaton.h"

namespace inferlab::cpu {

// Trees of a batch side by side, R rows of W nodes, as deep and as large as was kept of each.
struct DraftRows {
  int64_t width = 1;             // W: nodes of the largest one, root included
  std::vector<int32_t> tokens;   // [R, W], 0 behind a row's own
  std::vector<int32_t> parents;  // [R, W], -1 at the roots, -2 behind a row's own
  std::vector<int32_t> depths;   // [R] levels below the root
  std::vector<int32_t> counts;   // [R] nodes, root included
  bool is_chain = true;          // every node is the only child of the one before
  // Of each row parent and token of the first node that was not kept; parent -1: there is none.
  std::vector<std::pair<int32_t, int32_t>> left_out;
};

// Who judges drafts, told the chances of the nodes below each root, falling.
struct DraftJudge {
  using Worth = std::vector<std::vector<double>>;
  // Hears of what was offered for these texts last, kept or not: which of the nodes, by their
  // places from 1 on, they went through since. Empty where that is not known.
  std::function<void(const Worth& worth, const std::vector<std::vector<int>>& accepted)> followed;
  std::function<std::vector<int>(const Worth& worth)> keep;  // how many of each tree
};

class PromptLookup {
 public:
  // `corpus`: frozen, or null; it must stay. `limits`: of every text; depth and nodes are those of
  // each draft.
  PromptLookup(const SuffixAutomaton* corpus, const DraftLimits& limits)
      : corpus_(corpus), limits_(limits) {}

  // Tokens of a text that were read so far; more of them, all >= 0.
  int64_t length(int64_t text) const;
  void read(int64_t text, const int32_t* tokens, int64_t count);
  void release(int64_t text) { texts_.erase(text); }

  // Drafts of at most so many levels and nodes below the root for texts, which have been read.
  DraftRows draft(const std::vector<int64_t>& texts, int32_t depth, int32_t nodes,
                  const DraftJudge* judge = nullptr);

 private:
  struct Text {
    SuffixAutomaton own;
    SuffixAutomaton::Match in_corpus;
    DraftTrie offered;      // to a judge, last;
    size_t offered_at = 0;  // tokens that there were then
  };

  static std::vector<int> follow(const Text& text, size_t& known);

  const SuffixAutomaton* corpus_;
  DraftLimits limits_;
  std::unordered_map<int64_t, Text> texts_;
};

}  // namespace inferlab::cpu
