// SuffixAutomaton: all substrings of a growing text (Blumer et al., 1985), for drafts that repeat
// what followed earlier (SAM-Decoding, Hu et al., 2024). draft_trie makes a draft tree of it.
//
// A state stands for substrings that end at the same places of the text; its suffix link leads to
// the longest suffix that ends in more places. Adding a token takes amortised O(1): 2 states and 3
// edges per token at most. Edges of all states are in one open-addressing hash table, keyed by
// (state, token), and in a list per state; about 100 bytes per token in all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace inferlab::cpu {

class SuffixAutomaton {
 public:
  // The last `length` tokens of some text, which are among the substrings of `state`.
  struct Match {
    int32_t state = 0;
    int32_t length = 0;
  };

  // What followed a match: the token, where in the text it stood last, and how often.
  struct Successor {
    int32_t token;
    int32_t position;
    int32_t count;
  };

  SuffixAutomaton();

  // Adds tokens, all >= 0. Throws std::length_error beyond 2^29 tokens, std::logic_error if frozen.
  void extend(const int32_t* tokens, int64_t count);
  const std::vector<int32_t>& text() const { return text_; }
  int64_t num_states() const { return static_cast<int64_t>(states_.size()); }

  // The longest suffix of the text that also ends earlier in it, and where it last did: behind that
  // many tokens.
  Match repeated() const;
  int32_t earlier_end(Match match) const;

  // The match after one more token of the text that is matched.
  Match follow(Match match, int32_t token) const;

  // A match of at most `length` tokens: the match's own suffix.
  Match shortened(Match match, int32_t length) const;

  // The longest suffix of the match that occurs in more places than it; length 0: none.
  Match suffix(Match match) const;

  // How often the match occurred with a token behind it.
  int32_t earlier_count(Match match) const;

  // The up to `most` tokens that followed the match, most frequent first, then newest. O(different
  // tokens), after freeze() O(most).
  void successors(Match match, int64_t most, std::vector<Successor>& out) const;

  // Ends the text and puts the edges of each state in the order of `successors`.
  void freeze();

 private:
  // Ends and counts are kept for the states nearest to the newest token only: there are more than
  // these only where a text repeats itself many times over, and then the longest match matters.
  static constexpr int kRefreshed = 64;

  struct State {
    int32_t length = 0;  // of its longest substring
    int32_t link = -1;
    int32_t edges = -1;  // first of its list
    int32_t end = 0;     // newest place where it ends
    int32_t before = 0;  // the one before, 0: none
    int32_t count = 0;   // how often it occurs
  };
  struct Edge {
    int32_t source;
    int32_t token;
    int32_t target;
    int32_t next;
  };

  void append(int32_t token);
  void refresh(int32_t state);
  int32_t split(int32_t parent, int32_t edge);
  size_t slot(int32_t state, int32_t token) const;
  int32_t find(int32_t state, int32_t token) const { return table_[slot(state, token)]; }
  void add_edge(int32_t state, int32_t token, int32_t target);
  void grow();

  std::vector<int32_t> text_;
  std::vector<State> states_;
  std::vector<Edge> edges_;
  std::vector<int32_t> table_;  // of edges, -1: free; a power of two in size
  int32_t last_ = 0;            // the state of the whole text
  bool frozen_ = false;
};

// Where drafts come from, and what limits them.
struct DraftSources {
  const SuffixAutomaton* own;     // of the sequence itself
  const SuffixAutomaton* corpus;  // or null
  SuffixAutomaton::Match in_corpus;
};

struct DraftLimits {
  int32_t depth;      // tokens of a continuation
  int32_t branches;   // different continuations
  int32_t min_match;  // tokens that must have occurred
  int32_t max_match;  // tokens that are looked at
  int32_t margin;     // tokens by which the corpus's match must be longer than the own one
  int32_t nodes;      // below the root
};

// Node 0 is the root, the sequence's newest token, with parent -1; the others in order of worth.
struct DraftTrie {
  std::vector<int32_t> tokens;
  std::vector<int32_t> parents;
  std::vector<double> worth;  // estimated chances, the root's is 1
  int32_t depth = 0;
};

// Merges the continuations of the longest matches, then those of shorter ones; the sequence's own
// before the corpus's unless that match is longer by more than the margin. A token is worth the
// chance that the target takes it and all before it, estimated by share * L / (L + d) at depth d of
// a continuation of a match of L tokens, of which that share went on like this: a match of L tokens
// is taken to hold for another token in L of L + 1 cases, and it grows as it holds.
DraftTrie draft_trie(const DraftSources& sources, const DraftLimits& limits);

}  // namespace inferlab::cpu
