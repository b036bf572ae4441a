// The controller `cost`, and what it is made of, for specdec/planner.py and for tests.
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "planner/planner.h"
#include "planner/stragglers.h"
#include "tensor.h"

namespace py = pybind11;

namespace inferlab {
namespace {

using namespace planner;

using Levels = std::pair<int, int>;  // a budget
using Points = std::vector<std::pair<double, double>>;

Line line_of(const Points& points) {
  std::vector<double> xs, ys;
  for (const auto& [x, y] : points) {
    require(xs.empty() || x > xs.back(), "costs must be given by growing sizes");
    xs.push_back(x);
    ys.push_back(y);
  }
  return {std::move(xs), std::move(ys)};
}

StepCosts step_costs(const Points& own, double per_sequence, double per_key, double per_product) {
  require(!own.empty(), "own has no times; at least one number of rows must be measured");
  return {line_of(own), per_sequence, per_key, per_product};
}

DraftCosts draft_costs(const std::vector<std::pair<int, Points>>& table, const Points& reading,
                       double slowed) {
  DraftCosts costs;
  costs.slowed = slowed;
  for (const auto& [batch, by_nodes] : table) {
    require(!by_nodes.empty(), "table has a batch without times");
    require(batch > (costs.batches.empty() ? 0 : costs.batches.back()),
            "table must be given by growing batches");
    costs.batches.push_back(batch);
    costs.by_batch.push_back(line_of(by_nodes));
  }
  costs.reading = line_of(reading);
  return costs;
}

void require_sizes(const char* name, size_t found, size_t expected) {
  require(found == expected, [&] {
    return std::string(name) + " is of " + std::to_string(found) + " sequences; the step has " +
           std::to_string(expected);
  });
}

void require_kinds(const std::vector<int>& kinds, size_t count) {
  for (const int kind : kinds) {
    require(kind >= 0 && kind < static_cast<int>(count), [&] {
      return "kinds has " + std::to_string(kind) + "; the drafter named " + std::to_string(count) +
             " of them";
    });
  }
}

Outlook outlook_of(std::vector<int64_t> requests, double context, std::vector<int> remaining,
                   std::vector<int> unread, const std::optional<std::vector<int>>& able,
                   bool waiting, bool joining, bool packs, std::vector<int> written) {
  const auto size = static_cast<int>(requests.size());
  require(size > 0, "requests is empty; a step has at least one");
  if (!remaining.empty()) require_sizes("remaining", remaining.size(), size);
  if (!unread.empty()) require_sizes("unread", unread.size(), size);
  if (!written.empty()) require_sizes("written", written.size(), size);
  Outlook outlook{std::move(requests),
                  context,
                  std::move(remaining),
                  std::move(unread),
                  {},
                  std::move(written),
                  waiting,
                  joining,
                  packs};
  if (able) {
    for (const int place : *able) {
      require(place >= 0 && place < size, "able has a place that the batch has not");
    }
    outlook.able = *able;
  } else {
    for (int place = 0; place < size; ++place) outlook.able.push_back(place);
  }
  return outlook;
}

}  // namespace

void bind_planner(py::module_& parent) {
  py::module_ m = parent.def_submodule("planner", "Deciding how much to draft: csrc/planner.");

  py::class_<StepCosts>(m, "StepCosts", py::module_local())
      .def(py::init(&step_costs))
      .def("ms", &StepCosts::ms);
  py::class_<DraftCosts>(m, "DraftCosts", py::module_local())
      .def(py::init(&draft_costs))
      .def("ms", &DraftCosts::ms);

  py::class_<StepTimes>(m, "StepTimes", py::module_local())
      .def(py::init<StepCosts, DraftCosts>())
      .def("step", &StepTimes::step)
      .def("verified", &StepTimes::verified);

  py::class_<Acceptance>(m, "Acceptance", py::module_local())
      .def(py::init<std::vector<double>, double>(), py::arg("priors"), py::arg("evidence") = 0.0)
      .def_property_readonly("chances", &Acceptance::chances)
      .def_property_readonly("certainty", &Acceptance::certainty)
      .def("of",
           [](const Acceptance& self, int64_t request, const std::vector<int>& kinds) {
             require_kinds(kinds, self.chances().size());
             return self.of(request, kinds);
           })
      .def("learn", [](Acceptance& self, const std::vector<int64_t>& requests,
                       const std::vector<std::vector<int>>& kinds,
                       const std::vector<std::vector<int>>& accepted) {
        require_sizes("kinds", kinds.size(), requests.size());
        require_sizes("accepted", accepted.size(), requests.size());
        for (const auto& of_one : kinds) require_kinds(of_one, self.chances().size());
        self.learn(requests, kinds, accepted);
      });

  py::class_<Ranks>(m, "Ranks", py::module_local())
      .def(py::init<int, std::vector<double>, double>(), py::arg("nodes"), py::arg("priors"),
           py::arg("evidence") = 0.0)
      .def_property_readonly("chances",
                             [](const Ranks& self) {
                               std::vector<double> chances;
                               for (size_t n = 1; n < self.accepted().size(); ++n) {
                                 chances.push_back(self.accepted()[n] - self.accepted()[n - 1]);
                               }
                               return chances;
                             })
      .def("learn",
           [](Ranks& self, int nodes, const std::vector<std::vector<int>>& accepted) {
             self.learn(nodes, accepted, {}, std::vector<double>(accepted.size(), 1.0));
           })
      .def_property_readonly_static("HOPE", [](py::object) { return Ranks::kHope; });

  m.def("course",
        [](const std::vector<int>& remaining, const std::vector<std::vector<double>>& gained,
           const std::vector<double>& known, double own) {
          require(!remaining.empty(), "remaining is empty; a batch has at least one sequence");
          require_sizes("gained", gained.size(), remaining.size());
          require_sizes("known", known.size(), remaining.size());
          for (const auto& ways : gained) require_sizes("gained", ways.size(), gained[0].size());
          Course found = course(remaining, gained, known, own);
          return py::make_tuple(std::move(found.steps), std::move(found.pull));
        });
  m.def("lead", &lead);
  m.def("kinds_of", &kinds_of);
  m.attr("KINDS") = kKinds;
  m.attr("KIND_STEP") = kKindStep;
  m.attr("LOWEST_ODDS") = kLowestOdds;
  m.attr("TEXTS") = kTexts;
  m.attr("STEPS") = kSteps;

  py::class_<Judge>(m, "Judge", py::module_local());

  py::class_<Listener, Judge>(m, "Listener", py::module_local())
      .def(py::init<Judge*>(), py::arg("judge").none(true), py::keep_alive<1, 2>())
      .def("examined", &Listener::examined)
      .def("goes_on", &Listener::goes_on)
      .def("keep", &Listener::keep)
      .def("followed", &Listener::followed)
      .def_readonly("requests", &Listener::requests)
      .def_readonly("kinds", &Listener::kinds);

  py::class_<Planner, Judge>(m, "Planner", py::module_local())
      .def(py::init<StepCosts, DraftCosts, bool>())
      .def("climb",
           [](Planner& self, const std::vector<Levels>& rungs, std::vector<double> by_rank,
              std::vector<double> by_kind, double evidence, bool asks, bool looks_up,
              bool examines) {
             require(!rungs.empty() && rungs[0] == Levels(0, 0), "rungs must begin with (0, 0)");
             std::vector<Budget> budgets;
             for (const auto& [levels, nodes] : rungs) {
               require(budgets.empty() || nodes > budgets.back().nodes,
                       "rungs must be of growing numbers of nodes");
               budgets.push_back({levels, nodes});
             }
             self.climb(std::move(budgets), {std::move(by_rank), std::move(by_kind), evidence, asks,
                                             looks_up, examines});
           })
      .def("choose",
           [](Planner& self, std::vector<int64_t> requests, double context,
              std::vector<int> remaining, std::vector<int> unread,
              const std::optional<std::vector<int>>& able, bool waiting, bool joining, bool packs,
              std::vector<int> written) {
             const size_t size = requests.size();
             Decision decision = self.choose(
                 outlook_of(std::move(requests), context, std::move(remaining), std::move(unread),
                            able, waiting, joining, packs, std::move(written)));
             std::optional<std::vector<int>> members;
             if (decision.members.size() < size) members = std::move(decision.members);
             return py::make_tuple(decision.rung, std::move(members), decision.judged,
                                   decision.steps, decision.gives_up);
           })
      .def("follows",
           [](Planner& self, int tokens, std::vector<int64_t> requests, double context,
              std::vector<int> remaining, bool waiting, bool joining, bool packs) {
             return self.follows(tokens,
                                 outlook_of(std::move(requests), context, std::move(remaining), {},
                                            std::nullopt, waiting, joining, packs, {}));
           })
      .def("goes_on",
           [](Planner& self, const std::vector<int64_t>& requests, const std::vector<int>& kinds) {
             require_sizes("kinds", kinds.size(), requests.size());
             return self.goes_on(requests, kinds,
                                 [&](size_t count, size_t) { require_kinds(kinds, count); });
           })
      .def("keep",
           [](Planner& self, const std::vector<int64_t>& requests,
              const std::vector<std::vector<int>>& kinds) {
             require_sizes("kinds", kinds.size(), requests.size());
             return self.keep(requests, kinds, [&](size_t count, size_t most) {
               for (const auto& of_one : kinds) {
                 require_kinds(of_one, count);
                 require(of_one.size() <= most, "kinds has more nodes than the largest budget");
               }
             });
           })
      .def("followed",
           [](Planner& self, const std::vector<int64_t>& requests,
              const std::vector<std::vector<int>>& kinds,
              const std::vector<std::vector<int>>& accepted) {
             require_sizes("kinds", kinds.size(), requests.size());
             require_sizes("accepted", accepted.size(), requests.size());
             self.followed(requests, kinds, accepted, [&](size_t count, size_t) {
               for (const auto& of_one : kinds) require_kinds(of_one, count);
             });
           })
      .def("examined",
           [](Planner& self, const std::vector<int64_t>& requests,
              const std::vector<std::vector<double>>& sure,
              const std::vector<std::vector<bool>>& right) {
             require_sizes("sure", sure.size(), requests.size());
             require_sizes("right", right.size(), requests.size());
             for (size_t i = 0; i < sure.size(); ++i) {
               require(sure[i].size() == right[i].size(),
                       "sure and right must have an entry for each token, both");
               for (const double chance : sure[i]) {
                 require(chance >= 0 && chance <= 1, "sure must be in [0, 1]");
               }
             }
             return self.examined(requests, sure, right);
           })
      .def("rested", &Planner::rested)
      .def("observe",
           [](Planner& self, int size, Levels budget, double ms,
              std::vector<std::vector<int>> accepted, bool caught_up, int rows, double draft_ms,
              bool heard, std::vector<std::optional<bool>> came_true) {
             require_sizes("accepted", accepted.size(), size);
             if (!came_true.empty()) require_sizes("came_true", came_true.size(), size);
             return self.observe({size,
                                  {budget.first, budget.second},
                                  ms,
                                  std::move(accepted),
                                  caught_up,
                                  rows,
                                  draft_ms,
                                  heard,
                                  std::move(came_true)});
           })
      .def("own_share",
           [](Planner& self, std::vector<int64_t> requests, double context,
              std::vector<int> remaining, bool waiting) {
             return self.prospects().own_share(outlook_of(std::move(requests), context,
                                                          std::move(remaining), {}, std::nullopt,
                                                          waiting, false, false, {}));
           })
      .def_property_readonly("offered",
                             [](Planner& self) { return self.prospects().ranks.offered(); })
      .def_property_readonly("account_ms", &Planner::account_ms)
      .def_property_readonly("promised", &Planner::promised);

  py::class_<Account>(m, "Account", py::module_local())
      .def(py::init<>())
      .def("admit", &Account::admit)
      .def("expect", &Account::expect)
      .def("may_lose", &Account::may_lose, py::arg("smallest"))
      .def_readwrite("ms", &Account::ms)
      .def_property_readonly_static("FIRST", [](py::object) { return Account::kFirst; })
      .def_property_readonly_static("STAKE", [](py::object) { return Account::kStake; })
      .def_property_readonly_static("MOST", [](py::object) { return Account::kMost; })
      .def_property_readonly_static("SAVINGS", [](py::object) { return Account::kSavings; });
}

}  // namespace inferlab
