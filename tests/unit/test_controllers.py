"""Controllers, driven by a simulated drafter with known costs and acceptance."""

import random

import pytest

from inferlab.specdec.controllers import (
    AdaptiveController,
    CostController,
    FixedController,
    StepObservation,
    make_controller,
)
from inferlab.specdec.tree import NO_DRAFT, Budget

CHAIN = tuple(Budget(k, k) for k in range(1, 65))


class World:
    """A drafter and a target with known costs (ms) and per-level acceptance."""

    def __init__(self, plain_ms=10.0, draft_ms=1.0, node_ms=0.1, acceptance=0.8, seed=0):
        self.plain_ms, self.draft_ms, self.node_ms = plain_ms, draft_ms, node_ms
        self.acceptance = acceptance
        self.random = random.Random(seed)
        self.elapsed_ms = 0.0
        self.tokens = 0
        self.chosen: list[int] = []

    def cost(self, k: int) -> float:
        return self.plain_ms + k * (self.draft_ms + self.node_ms)

    def rate(self, k: int) -> float:
        return sum(self.acceptance**i for i in range(k + 1)) / self.cost(k)

    def run(self, controller, steps: int, batch_size: int = 1) -> None:
        for _ in range(steps):
            budget = controller.choose(batch_size, CHAIN)
            k = budget.levels
            accepted = []
            for _ in range(batch_size):
                n = 0
                while n < k and self.random.random() < self.acceptance:
                    n += 1
                accepted.append(n)
            noisy = self.cost(k) * self.random.uniform(0.9, 1.1)
            self.elapsed_ms += noisy
            self.tokens += sum(accepted) + batch_size
            self.chosen.append(k)
            walks = [list(range(1, n + 1)) for n in accepted]
            controller.observe(StepObservation(batch_size, budget, noisy, [k] * batch_size, walks))


def test_fixed_never_moves():
    controller = FixedController(3)
    World(acceptance=0.0).run(controller, 20)
    assert controller.choose(1, CHAIN).levels == 3


@pytest.mark.parametrize(("acceptance", "expected"), [(1.0, 6), (0.0, 2)])
def test_adaptive_goes_to_its_bounds(acceptance, expected):
    controller = AdaptiveController(min_k=2, max_k=6, target_acceptance=0.7)
    World(acceptance=acceptance).run(controller, 30)
    assert controller.choose(1, CHAIN).levels == expected


def test_adaptive_ignores_steps_without_drafts():
    controller = AdaptiveController(min_k=1, max_k=8)
    before = controller.choose(1, CHAIN)
    controller.observe(StepObservation(1, Budget(4, 4), 1.0, [0], [[]]))
    assert controller.choose(1, CHAIN) == before


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.95])
def test_cost_comes_within_a_few_percent_of_the_best_k(acceptance):
    world = World(acceptance=acceptance, seed=1)
    controller = CostController(max_k=8)
    world.run(controller, 100)
    world.elapsed_ms, world.tokens = 0.0, 0
    world.run(controller, 2000)
    best = max(world.rate(k) for k in range(9))
    assert world.tokens / world.elapsed_ms >= 0.93 * best


@pytest.mark.parametrize("draft_ms", [0.2, 5.0, 20.0])
def test_cost_with_a_useless_drafter_costs_at_most_five_percent(draft_ms):
    world = World(acceptance=0.0, draft_ms=draft_ms, seed=2)
    controller = CostController(max_k=8)
    world.run(controller, 20)  # its warm-up
    world.elapsed_ms, world.tokens = 0.0, 0
    world.run(controller, 2000)
    assert controller.describe()["chosen_nodes"] == {1: 0}
    plain = 1 / world.plain_ms
    assert world.tokens / world.elapsed_ms >= 0.95 * plain


def test_cost_comes_back_when_the_drafter_becomes_good():
    world = World(acceptance=0.0, seed=3)
    controller = CostController(max_k=8)
    world.run(controller, 200)
    assert controller.choose(1, CHAIN).levels in (0, 2)
    world.acceptance = 0.9
    world.run(controller, 1500)
    assert world.chosen[-1] >= 4


def test_cost_keeps_batch_sizes_apart():
    controller = CostController(max_k=6)
    World(acceptance=0.8, draft_ms=0.5, seed=4).run(controller, 100, batch_size=1)
    World(acceptance=0.8, draft_ms=0.5, node_ms=20.0, seed=5).run(controller, 100, batch_size=32)
    chosen = controller.describe()["chosen_nodes"]
    assert chosen[1] >= 3
    assert chosen[32] == 0


def test_cost_begins_a_batch_size_where_its_neighbour_is():
    controller = CostController(8)
    World(acceptance=0.9).run(controller, 200, batch_size=4)
    learnt = controller.choose(4, CHAIN).levels
    smaller = World(acceptance=0.9)
    smaller.run(controller, 3, batch_size=2)
    assert smaller.chosen == [learnt, 0, learnt]


def test_cost_goes_on_where_the_first_steps_of_a_batch_size_cannot_be_measured():
    controller = CostController(8)
    World(acceptance=0.9).run(controller, 200, batch_size=4)
    for _ in range(12):
        budget = controller.choose(2, CHAIN)
        walks = [list(range(1, budget.levels + 1))] * 2
        step = StepObservation(2, budget, 10.0, [budget.levels] * 2, walks, budget != NO_DRAFT)
        controller.observe(step)
    assert controller.choose(2, CHAIN) != NO_DRAFT


def test_cost_does_not_try_in_a_larger_batch_what_did_not_pay_in_a_smaller_one():
    controller = CostController(8)
    World(acceptance=0.05, draft_ms=5.0).run(controller, 200, batch_size=1)
    larger = World(acceptance=0.05, draft_ms=5.0)
    larger.run(controller, 30, batch_size=8)
    assert larger.chosen == [0] * 30
    smaller = CostController(8)
    World(acceptance=0.05, draft_ms=5.0).run(smaller, 200, batch_size=8)
    tried = World(acceptance=0.05, draft_ms=5.0)
    tried.run(smaller, 30, batch_size=1)
    assert any(tried.chosen)


def test_cost_probes_what_is_dear_less_often():
    """The second probe on waits until the last one's loss is a small share of the time."""
    cheap, dear = World(acceptance=0.0, draft_ms=0.5), World(acceptance=0.0, draft_ms=500.0)
    for world in (cheap, dear):
        world.run(CostController(8), 20_000)
    assert sum(map(bool, dear.chosen)) < sum(map(bool, cheap.chosen))
    lost = dear.elapsed_ms - 20_000 * dear.plain_ms
    assert lost < 0.05 * dear.elapsed_ms


def test_cost_counts_levels_that_were_not_offered_as_rejected():
    controller = CostController(max_k=4)
    controller.choose(1, CHAIN)
    for _ in range(50):
        controller.observe(StepObservation(1, Budget(4, 4), 10.0, [0], [[]]))
    assert controller.describe()["acceptance"][0] < 0.1


def test_cost_picks_the_node_budget_where_more_nodes_stop_paying():
    """Ten nodes on two levels: the first three are accepted now and then, the others never."""
    ladder = tuple(Budget(2, n) for n in (1, 2, 3, 4, 6, 10))
    chances = [0.5, 0.2, 0.2] + [0.0] * 7
    controller, rng = CostController(max_k=8), random.Random(7)
    for _ in range(400):
        budget = controller.choose(1, ladder)
        draw = rng.random()
        ranks = [
            i + 1
            for i, chance in enumerate(chances)
            if sum(chances[:i]) <= draw < sum(chances[:i]) + chance
        ]
        walk = [r for r in ranks if r <= budget.nodes]
        ms = 10.0 + (1.0 if budget.nodes else 0.0) + 0.3 * budget.nodes
        controller.observe(StepObservation(1, budget, ms, [min(budget.levels, 2)], [walk]))
    assert controller.describe()["chosen_nodes"] == {1: 3}


def test_cost_does_not_learn_from_a_step_that_was_cut_short():
    ladder = CHAIN[:4]
    controller = CostController(max_k=4)
    controller.choose(1, ladder)
    for _ in range(20):
        controller.observe(StepObservation(1, Budget(4, 4), 10.0, [4], [[1, 2, 3, 4]]))
    before = controller.describe()["acceptance"]
    controller.observe(StepObservation(1, Budget(1, 4), 3.0, [1], [[]]))
    assert controller.describe()["acceptance"] == before


def test_cost_with_no_room_to_draft():
    controller = CostController(max_k=0)
    World().run(controller, 100)
    assert controller.choose(1, CHAIN) == NO_DRAFT


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("fixed", {"k": -1}, "k is -1"),
        ("fixed", {"k": 65}, "k is 65"),
        ("adaptive", {"min_k": 5, "max_k": 2}, "max_k is 2"),
        ("adaptive", {"target_acceptance": 1.5}, "target_acceptance is 1.5"),
        ("cost", {"max_k": 100}, "max_k is 100"),
        ("magic", {}, "controller is 'magic'"),
    ],
)
def test_bad_settings_are_named(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_controller(name, **kwargs)
