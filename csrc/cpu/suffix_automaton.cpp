#include "inferlab/suffix_automaton.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace inferlab::cpu {

using Match = SuffixAutomaton::Match;
using Successor = SuffixAutomaton::Successor;

namespace {

bool better(const Successor& a, const Successor& b) {
  return a.count != b.count ? a.count > b.count : a.position > b.position;
}

}  // namespace

SuffixAutomaton::SuffixAutomaton() : states_(1), table_(64, -1) {}

void SuffixAutomaton::extend(const int32_t* tokens, int64_t count) {
  if (count > (int64_t{1} << 29) - static_cast<int64_t>(text_.size())) {
    throw std::length_error("a suffix automaton holds 2^29 tokens at most");
  }
  if (frozen_) throw std::logic_error("this suffix automaton is frozen");
  for (int64_t i = 0; i < count; ++i) append(tokens[i]);
}

void SuffixAutomaton::append(int32_t token) {
  text_.push_back(token);
  const auto current = static_cast<int32_t>(states_.size());
  states_.emplace_back();
  states_[current].length = static_cast<int32_t>(text_.size());
  int32_t state = last_, edge = -1;
  while (state >= 0 && (edge = find(state, token)) < 0) {
    add_edge(state, token, current);
    state = states_[state].link;
  }
  // The longest suffix that occurred before ends the walk: with the newest token it is the longest
  // substring of its state, or becomes that of a state of its own.
  int32_t link = 0;
  if (state >= 0) {
    link = edges_[edge].target;
    if (states_[link].length != states_[state].length + 1) link = split(state, edge);
  }
  states_[current].link = link;
  last_ = current;
  refresh(current);
}

// Gives the substrings that `edge` of `state` ends, and their suffixes, a state of their own.
int32_t SuffixAutomaton::split(int32_t state, int32_t edge) {
  const int32_t token = edges_[edge].token, whole = edges_[edge].target;
  const auto clone = static_cast<int32_t>(states_.size());
  State copy = states_[whole];
  copy.length = states_[state].length + 1;
  copy.edges = -1;
  states_.push_back(copy);
  for (int32_t e = states_[whole].edges; e >= 0; e = edges_[e].next) {
    add_edge(clone, edges_[e].token, edges_[e].target);
  }
  states_[whole].link = clone;
  while (state >= 0 && (edge = find(state, token)) >= 0 && edges_[edge].target == whole) {
    edges_[edge].target = clone;
    state = states_[state].link;
  }
  return clone;
}

void SuffixAutomaton::refresh(int32_t state) {
  const auto end = static_cast<int32_t>(text_.size());
  for (int i = 0; i < kRefreshed && state > 0; ++i) {
    State& s = states_[state];
    s.before = s.end;
    s.end = end;
    ++s.count;
    state = s.link;
  }
}

size_t SuffixAutomaton::slot(int32_t state, int32_t token) const {
  const uint64_t key = uint64_t(uint32_t(state)) << 32 | uint32_t(token);
  const uint64_t mask = table_.size() - 1;
  // Fibonacci hashing: the product's high bits depend on all of the key's.
  uint64_t at = (key * 0x9E3779B97F4A7C15u >> 32) & mask;
  for (;; at = (at + 1) & mask) {
    const int32_t edge = table_[at];
    if (edge < 0 || (edges_[edge].source == state && edges_[edge].token == token)) break;
  }
  return at;
}

void SuffixAutomaton::add_edge(int32_t state, int32_t token, int32_t target) {
  if (2 * (edges_.size() + 1) > table_.size()) grow();
  const auto edge = static_cast<int32_t>(edges_.size());
  table_[slot(state, token)] = edge;
  edges_.push_back({state, token, target, states_[state].edges});
  states_[state].edges = edge;
}

void SuffixAutomaton::grow() {
  table_.assign(2 * table_.size(), -1);
  for (size_t e = 0; e < edges_.size(); ++e) {
    table_[slot(edges_[e].source, edges_[e].token)] = static_cast<int32_t>(e);
  }
}

Match SuffixAutomaton::repeated() const { return suffix({last_, states_[last_].length}); }

int32_t SuffixAutomaton::earlier_end(Match match) const {
  const State& state = states_[match.state];
  return state.end == static_cast<int32_t>(text_.size()) ? state.before : state.end;
}

Match SuffixAutomaton::follow(Match match, int32_t token) const {
  int32_t edge;
  while ((edge = find(match.state, token)) < 0) {
    if (match.state == 0) return {};
    match = suffix(match);
  }
  return {edges_[edge].target, match.length + 1};
}

Match SuffixAutomaton::shortened(Match match, int32_t length) const {
  if (match.length <= length) return match;
  while (match.state != 0 && states_[states_[match.state].link].length >= length) {
    match.state = states_[match.state].link;
  }
  return {match.state, length};
}

Match SuffixAutomaton::suffix(Match match) const {
  const int32_t link = std::max(states_[match.state].link, 0);
  return {link, states_[link].length};
}

int32_t SuffixAutomaton::earlier_count(Match match) const {
  const State& state = states_[match.state];
  return state.count - (state.end == static_cast<int32_t>(text_.size()));
}

void SuffixAutomaton::successors(Match match, int64_t most, std::vector<Successor>& out) const {
  out.clear();
  for (int32_t e = states_[match.state].edges; e >= 0; e = edges_[e].next) {
    if (frozen_ && static_cast<int64_t>(out.size()) == most) return;
    const State& target = states_[edges_[e].target];
    out.push_back({edges_[e].token, target.end - 1, target.count});
  }
  const auto kept = std::min<int64_t>(most, static_cast<int64_t>(out.size()));
  std::partial_sort(out.begin(), out.begin() + kept, out.end(), better);
  out.resize(static_cast<size_t>(kept));
}

void SuffixAutomaton::freeze() {
  std::vector<std::pair<Successor, int32_t>> edges;
  for (State& state : states_) {
    edges.clear();
    for (int32_t e = state.edges; e >= 0; e = edges_[e].next) {
      const State& target = states_[edges_[e].target];
      edges.push_back({{edges_[e].token, target.end - 1, target.count}, e});
    }
    std::sort(edges.begin(), edges.end(),
              [](const auto& a, const auto& b) { return better(a.first, b.first); });
    int32_t* link = &state.edges;
    for (const auto& [successor, edge] : edges) {
      *link = edge;
      link = &edges_[edge].next;
    }
    *link = -1;
  }
  frozen_ = true;
}

namespace {

// A trie that grows a continuation at a time.
class TrieBuilder {
 public:
  explicit TrieBuilder(int32_t root) { nodes_.push_back({root, -1, -1, -1, 0, 2.0}); }

  // Adds the continuation that starts at `position` of a text; says whether it was a new one.
  // The sequence's own text goes on behind its end with the continuation itself, as it would if it
  // repeated itself.
  bool add(const std::vector<int32_t>& text, int32_t position, bool own, int32_t depth,
           int32_t match, double share) {
    const size_t before = nodes_.size();
    const auto end = static_cast<int32_t>(text.size());
    path_.clear();
    int32_t node = 0;
    for (int32_t d = 1; d <= depth; ++d, ++position) {
      if (position >= end && !own) break;
      const int32_t token = position < end ? text[position] : nodes_[path_[position - end]].token;
      node = child(node, token);
      nodes_[node].worth = std::max(nodes_[node].worth, share * match / (match + d));
      path_.push_back(node);
    }
    return nodes_.size() > before;
  }

  // The `most` nodes below the root that are worth most. A node is worth less than its parent.
  DraftTrie best(int32_t most) const {
    std::vector<int32_t> order(nodes_.size());
    for (size_t n = 0; n < order.size(); ++n) order[n] = static_cast<int32_t>(n);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return nodes_[a].worth > nodes_[b].worth; });
    order.resize(std::min(order.size(), static_cast<size_t>(most) + 1));
    std::vector<int32_t> place(nodes_.size());
    DraftTrie trie;
    for (const int32_t n : order) {
      place[n] = static_cast<int32_t>(trie.tokens.size());
      trie.tokens.push_back(nodes_[n].token);
      trie.parents.push_back(n == 0 ? -1 : place[nodes_[n].parent]);
      trie.worth.push_back(std::min(nodes_[n].worth, 1.0));
      trie.depth = std::max(trie.depth, nodes_[n].depth);
    }
    return trie;
  }

 private:
  struct Node {
    int32_t token;
    int32_t parent;
    int32_t first_child;
    int32_t next_sibling;
    int32_t depth;
    double worth;
  };

  int32_t child(int32_t node, int32_t token) {
    for (int32_t c = nodes_[node].first_child; c >= 0; c = nodes_[c].next_sibling) {
      if (nodes_[c].token == token) return c;
    }
    const auto added = static_cast<int32_t>(nodes_.size());
    nodes_.push_back({token, node, -1, nodes_[node].first_child, nodes_[node].depth + 1, 0.0});
    nodes_[node].first_child = added;
    return added;
  }

  std::vector<Node> nodes_;
  std::vector<int32_t> path_;  // of the continuation that is added
};

}  // namespace

DraftTrie draft_trie(const DraftSources& sources, const DraftLimits& limits) {
  const SuffixAutomaton& own = *sources.own;
  TrieBuilder trie(own.text().back());
  Match in_own = own.shortened(own.repeated(), limits.max_match), in_corpus;
  if (sources.corpus != nullptr) {
    in_corpus = sources.corpus->shortened(sources.in_corpus, limits.max_match);
  }
  std::vector<Successor> successors;
  int32_t found = 0;
  while (found < limits.branches && std::max(in_own.length, in_corpus.length) >= limits.min_match) {
    const bool is_own = in_own.length >= limits.min_match &&
                        int64_t{in_own.length} + limits.margin >= in_corpus.length;
    const SuffixAutomaton& source = is_own ? own : *sources.corpus;
    Match& match = is_own ? in_own : in_corpus;
    const double occurrences = source.earlier_count(match);
    source.successors(match, limits.branches, successors);
    for (const Successor& s : successors) {
      const double share = std::min(s.count / occurrences, 1.0);
      found += trie.add(source.text(), s.position, is_own, limits.depth, match.length, share);
      if (found == limits.branches) break;
    }
    match = source.suffix(match);
  }
  return trie.best(limits.nodes);
}

}  // namespace inferlab::cpu
