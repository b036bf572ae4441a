#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "inferlab/suffix_automaton.h"
#include "tensor.h"

namespace py = pybind11;

namespace inferlab {
namespace {

using cpu::SuffixAutomaton;
using Cursor = std::pair<int32_t, int32_t>;  // state and length of a match

void require_tokens(const std::vector<int32_t>& tokens) {
  for (const int32_t token : tokens) {
    require(token >= 0, [&] {
      return "tokens has " + std::to_string(token) + "; token ids must be in [0, 2**31)";
    });
  }
}

SuffixAutomaton::Match match_of(const SuffixAutomaton& automaton, Cursor cursor) {
  const auto [state, length] = cursor;
  require(state >= 0 && state < automaton.num_states() && length >= 0, [&] {
    return "cursor is (" + std::to_string(state) + ", " + std::to_string(length) +
           "); it must come from follow() of the same automaton, or be (0, 0)";
  });
  return {state, length};
}

}  // namespace

void bind_suffix(py::module_& m) {
  py::class_<SuffixAutomaton>(m, "SuffixAutomaton", py::module_local())
      .def(py::init<>())
      .def("__len__", [](const SuffixAutomaton& self) { return self.text().size(); })
      .def("extend",
           [](SuffixAutomaton& self, const std::vector<int32_t>& tokens) {
             require_tokens(tokens);
             self.extend(tokens.data(), static_cast<int64_t>(tokens.size()));
           })
      .def("freeze", &SuffixAutomaton::freeze)
      .def("repeated",
           [](const SuffixAutomaton& self) {
             const auto match = self.repeated();
             return std::pair(match.length, match.length > 0 ? self.earlier_end(match) : 0);
           })
      .def("follow",
           [](const SuffixAutomaton& self, Cursor cursor, const std::vector<int32_t>& tokens) {
             require_tokens(tokens);
             auto match = match_of(self, cursor);
             for (const int32_t token : tokens) match = self.follow(match, token);
             return Cursor(match.state, match.length);
           });
  m.def("draft_trie",
        [](const SuffixAutomaton& own, const SuffixAutomaton* corpus, Cursor cursor, int depth,
           int branches, int min_match, int max_match, int margin, int nodes) {
          require(!own.text().empty(), "own has no tokens; a draft needs a root");
          for (const auto& [name, value] :
               {std::pair("depth", depth), {"branches", branches}, {"min_match", min_match}}) {
            require(value >= 1, [&, name = name, value = value] {
              return std::string(name) + " is " + std::to_string(value) + "; it must be >= 1";
            });
          }
          for (const auto& [name, value] : {std::pair("margin", margin), {"nodes", nodes}}) {
            require(value >= 0, [&, name = name, value = value] {
              return std::string(name) + " is " + std::to_string(value) + "; it must be >= 0";
            });
          }
          SuffixAutomaton::Match in_corpus;
          if (corpus != nullptr) in_corpus = match_of(*corpus, cursor);
          cpu::DraftTrie trie = cpu::draft_trie(
              {&own, corpus, in_corpus}, {depth, branches, min_match, max_match, margin, nodes});
          return py::make_tuple(std::move(trie.tokens), std::move(trie.parents), trie.depth,
                                std::move(trie.worth));
        });
}

}  // namespace inferlab
