#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "inferlab/prompt_lookup.h"
#include "inferlab/suffix_automaton.h"
#include "planner/acceptance.h"
#include "planner/judge.h"
#include "tensor.h"

namespace py = pybind11;

namespace inferlab {
namespace {

using cpu::PromptLookup;
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

void require_limits(const cpu::DraftLimits& limits) {
  for (const auto& [name, value, least] : {std::tuple("depth", limits.depth, 1),
                                           {"branches", limits.branches, 1},
                                           {"min_match", limits.min_match, 1},
                                           {"margin", limits.margin, 0},
                                           {"nodes", limits.nodes, 0}}) {
    require(value >= least, [&, name = name, value = value, least = least] {
      return std::string(name) + " is " + std::to_string(value) +
             "; it must be >= " + std::to_string(least);
    });
  }
}

// Takes what a text has grown by since it was last read.
void read_on(PromptLookup& lookup, int64_t text, const py::list& tokens) {
  std::vector<int32_t> added;
  for (size_t i = lookup.length(text); i < tokens.size(); ++i) {
    added.push_back(tokens[i].cast<int32_t>());
  }
  require_tokens(added);
  lookup.read(text, added.data(), static_cast<int64_t>(added.size()));
  require(lookup.length(text) > 0, "a text has no tokens; a draft needs a root");
}

using Kinds = std::vector<std::vector<int>>;

Kinds kinds_of_all(const cpu::DraftJudge::Worth& worth) {
  Kinds kinds;
  for (const auto& chances : worth) kinds.push_back(planner::kinds_of(chances));
  return kinds;
}

// A compiled or a Python one: see `Judge` in specdec/control.py.
cpu::DraftJudge draft_judge(const py::object& judge, const std::vector<int64_t>& texts) {
  auto* compiled = py::isinstance<planner::Judge>(judge) ? judge.cast<planner::Judge*>() : nullptr;
  return {[&, compiled](const cpu::DraftJudge::Worth& worth, const Kinds& accepted) {
            const Kinds kinds = kinds_of_all(worth);
            if (compiled != nullptr) return compiled->followed(texts, kinds, accepted);
            judge.attr("followed")(texts, kinds, accepted);
          },
          [&, compiled](const cpu::DraftJudge::Worth& worth) {
            const Kinds kinds = kinds_of_all(worth);
            if (compiled != nullptr) return compiled->keep(texts, kinds);
            return judge.attr("keep")(texts, kinds).cast<std::vector<int>>();
          }};
}

py::tuple draft(PromptLookup& self, const std::vector<int64_t>& texts,
                const std::vector<py::list>& tokens, int32_t depth, int32_t nodes,
                const py::object& judge) {
  require(tokens.size() == texts.size(), "tokens must have one list for each text");
  require_limits({depth, 1, 1, 1, 0, nodes});
  for (size_t i = 0; i < texts.size(); ++i) read_on(self, texts[i], tokens[i]);
  cpu::DraftJudge asked;
  if (!judge.is_none()) asked = draft_judge(judge, texts);
  cpu::DraftRows rows = self.draft(texts, depth, nodes, judge.is_none() ? nullptr : &asked);
  const std::vector<py::ssize_t> shape{static_cast<py::ssize_t>(texts.size()), rows.width};
  return py::make_tuple(py::array_t<int32_t>(shape, rows.tokens.data()),
                        py::array_t<int32_t>(shape, rows.parents.data()), rows.is_chain,
                        std::move(rows.depths), std::move(rows.counts), std::move(rows.left_out));
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
  py::class_<PromptLookup>(m, "PromptLookup", py::module_local())
      .def(py::init([](const SuffixAutomaton* corpus, int branches, int min_match, int max_match,
                       int margin) {
             const cpu::DraftLimits limits{1, branches, min_match, max_match, margin, 0};
             require_limits(limits);
             return std::make_unique<PromptLookup>(corpus, limits);
           }),
           py::keep_alive<1, 2>())
      .def("draft", &draft)
      .def("release", &PromptLookup::release);
  m.def("draft_trie",
        [](const SuffixAutomaton& own, const SuffixAutomaton* corpus, Cursor cursor, int depth,
           int branches, int min_match, int max_match, int margin, int nodes) {
          require(!own.text().empty(), "own has no tokens; a draft needs a root");
          const cpu::DraftLimits limits{depth, branches, min_match, max_match, margin, nodes};
          require_limits(limits);
          SuffixAutomaton::Match in_corpus;
          if (corpus != nullptr) in_corpus = match_of(*corpus, cursor);
          cpu::DraftTrie trie = cpu::draft_trie({&own, corpus, in_corpus}, limits);
          return py::make_tuple(std::move(trie.tokens), std::move(trie.parents), trie.depth,
                                std::move(trie.worth));
        });
}

}  // namespace inferlab
