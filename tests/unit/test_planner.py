"""The planning controller on a virtual clock: never much slower than plain, near the best K."""

import copy
import pickle
import random
import threading
from statistics import median

import numpy as np
import pytest
from inferlab._C.planner import STEPS, TEXTS, Account, course, lead

from helpers.simulation import CHAIN, World
from inferlab import SpeculativePipeline
from inferlab.specdec.acceptance import SURE, Acceptance, Known, kinds_of
from inferlab.specdec.control import Outlook, StepObservation
from inferlab.specdec.costs import CostModel, DraftCosts, DraftTime, StepCosts, StepTime
from inferlab.specdec.planner import CostController
from inferlab.specdec.tree import NO_DRAFT, Budget
from inferlab.specdec.verdict import Report


def against_plain(world: World, controller, tokens: int, size: int) -> float:
    start_ms, start = world.elapsed_ms, world.tokens
    world.run(controller, tokens, size)
    steps_ms = tokens * world.verify_ms(size)
    assert world.tokens - start == tokens * size
    return steps_ms / (world.elapsed_ms - start_ms)


def scenarios(count: int, seed: int):
    rng = random.Random(seed)
    for i in range(count):
        yield (
            World(
                acceptance=rng.choice((0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)),
                draft_ms=rng.choice((0.05, 0.3, 1.0, 2.0, 5.0)),
                row_ms=rng.choice((0.02, 0.1, 0.5, 3.0)),
                sure=rng.random() < 0.5,
                seed=i,
            ),
            rng.choice((1, 4, 16)),
            rng.choice((64, 256)),
        )


def test_first_runs_are_never_much_slower_than_plain():
    ratios = []
    for world, size, tokens in scenarios(300, seed=1):
        ratios.append(against_plain(world, CostController(8, world.costs()), tokens, size))
    ratios.sort()
    assert ratios[0] > 0.88
    assert ratios[len(ratios) // 20] > 0.96
    assert median(ratios) > 1.05


def test_regret_against_the_best_fixed_k_is_small():
    """In the median over scenarios where drafting pays, and where it does not."""
    regrets = []
    for world, _, _ in scenarios(200, seed=2):
        controller = CostController(8, world.costs())
        world.run(controller, 2000)
        regrets.append(1 - world.tokens / world.elapsed_ms / world.best_rate(1))
    assert median(regrets) <= 0.05


@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_costs_that_are_off_are_corrected(wrong):
    ratios = []
    for world, size, _ in scenarios(60, seed=3):
        controller = CostController(8, world.costs(wrong))
        against_plain(world, controller, 64, size)
        ratios.append(against_plain(world, controller, 256, size))
    assert min(ratios) > 0.9
    assert median(ratios) > 1.0


def test_costs_that_were_never_measured_are_learnt():
    good, bad = World(acceptance=0.9, draft_ms=0.3), World(acceptance=0.0, draft_ms=0.3)
    assert against_plain(good, CostController(8), 2000, 1) > 1.5
    assert against_plain(bad, CostController(8), 2000, 1) > 0.97


def test_drafting_stops_when_acceptance_collapses_and_comes_back():
    world = World(acceptance=0.9)
    controller = CostController(8, world.costs())
    world.run(controller, 600)
    assert world.chosen[-1] > 0
    world.acceptance = 0.0
    before = len(world.chosen)
    world.run(controller, 300)
    assert sum(map(bool, world.chosen[before + 60 :])) < 0.1 * len(world.chosen[before + 60 :])
    world.acceptance = 0.9
    for _ in range(20):
        world.run(controller, 100)
    assert world.chosen[-1] > 0


def test_drafting_stops_when_drafts_become_dear():
    world = World(acceptance=0.8)
    controller = CostController(8, world.costs())
    world.run(controller, 400)
    assert world.chosen[-1] > 0
    world.draft_ms *= 20
    ratio = against_plain(world, controller, 600, 1)
    assert ratio > 0.9
    assert sum(world.chosen[-200:]) == 0


def test_plain_steps_are_not_judged_by_those_behind_drafts():
    """These take longer than plain ones among themselves; by them drafting seems to pay."""
    world = World(acceptance=0.7, behind=1.5)
    controller = CostController(8, world.costs())
    world.run(controller, 400)
    assert world.chosen[-1] > 0
    world.draft_ms *= 8
    assert world.best_rate(1) == world.rate(0, 1)
    assert against_plain(world, controller, 2000, 1) > 0.97
    assert sum(map(bool, world.chosen[-500:])) < 50


def test_texts_of_mixed_difficulty_get_drafts_of_their_own():
    world = World(acceptance=[0.95, 0.05], sure=True, draft_ms=0.2, row_ms=0.5, flat=1)
    controller = CostController(8, world.costs())
    observed = []
    learn = controller.observe
    controller.observe = lambda step: (observed.append(step), learn(step))
    world.run(controller, 400, 2, waiting=True)
    both = [step for step in observed if step.batch_size == 2 and sum(step.depths)]
    easy, hard = (sum(step.depths[i] for step in both) for i in (0, 1))
    assert easy > 2 * hard


def test_a_text_is_only_read_for_where_that_pays():
    dear = World(acceptance=0.9, reading_ms=2000.0)
    controller = CostController(8, dear.costs())
    assert against_plain(dear, controller, 64, 4) > 0.97
    assert sum(dear.chosen) == 0
    cheap = World(acceptance=0.9, reading_ms=5.0)
    assert against_plain(cheap, CostController(8, cheap.costs()), 256, 4) > 1.2


def test_what_is_not_known_is_tried_on_one_text_first():
    world = World(acceptance=0.9, reading_ms=4.0, draft_ms=0.2)
    controller = CostController(8, world.costs())
    outlook = Outlook(CHAIN, list(range(8)), 32.0, [64] * 8, [32] * 8, packs=True)
    choice = controller.choose(outlook)
    if choice.budget == NO_DRAFT:  # the first step is timed
        choice = controller.choose(outlook)
    assert choice.budget != NO_DRAFT
    assert choice.members is not None
    assert 1 <= len(choice.members) < 4


def test_a_drafter_is_examined_on_what_texts_say_before_it_drafts():
    """One that is always wrong costs a reading, and no step; one that is good gains most of what
    it would if that were known."""
    useless = World(
        acceptance=0.0, reading_ms=5.0, draft_ms=2.0, row_ms=2.0, flat=1, sure=True, examines=True
    )
    controller = CostController(8, useless.costs())
    assert against_plain(useless, controller, 64, 1) > 0.98
    assert sum(useless.chosen) <= 1
    assert useless.elapsed_ms > 64 * 9.5, "it was read"
    for _ in range(20):
        useless.run(controller, 64)
    assert against_plain(useless, controller, 64, 1) > 0.98
    good = World(acceptance=0.9, reading_ms=5.0, draft_ms=0.5, sure=True, examines=True)
    controller = CostController(8, good.costs())
    assert against_plain(good, controller, 64, 1) > 0.6 * good.best_rate(1) * good.plain_ms
    assert sum(good.chosen[:7]) == 0


def test_a_text_on_which_a_drafter_fails_does_not_condemn_it_for_others():
    world = World(
        acceptance=0.2, reading_ms=5.0, draft_ms=1.0, row_ms=1.0, sure=True, examines=True
    )
    controller = CostController(8, world.costs())
    world.run(controller, 64)
    world.acceptance = 0.9
    for _ in range(6):
        world.run(controller, 64)
    assert against_plain(world, controller, 64, 1) > 1.3


def test_little_evidence_does_not_dismiss_what_was_decided():
    known = Known(by_kind=SURE, evidence=8.0, asks=True, examines=True)
    world = World(acceptance=0.9, reading_ms=1.0, draft_ms=3.0)
    controller = CostController(4, world.costs())
    outlook = Outlook(CHAIN[:4], [0], 32.0, [60], [32], packs=True, known=known, written=[1])
    choice = controller.choose(outlook)
    assert choice.judge is not None
    assert choice.judge.examined([0], [[0.9] * 3], [[False] * 3])
    assert choice.judge.examined([1], [[0.9] * 9], [[False] * 9]), "another step's"
    assert not choice.judge.examined([0], [[0.9] * 16], [[False] * 16])
    account = controller._planner.account_ms
    assert not choice.judge.examined([0], [[0.9] * 16], [[True] * 16]), "it was told already"
    assert controller._planner.account_ms == account
    with pytest.raises(ValueError, match="an entry for each token"):
        choice.judge.examined([0], [[0.9]], [[]])
    with pytest.raises(ValueError, match=r"sure must be in \[0, 1\]"):
        choice.judge.examined([0], [[float("nan")]], [[True]])


def test_an_examination_counts_what_follows_a_wrong_token_as_drafted_in_vain():
    """As a step does: else deep nodes were as likely as where all before them hold."""
    known = Known(by_kind=SURE, asks=True, examines=True)
    world = World(reading_ms=1.0, draft_ms=0.1, row_ms=3.0, flat=1)
    controller = CostController(6, world.costs())
    outlook = Outlook(CHAIN[:6], [0], 32.0, [60], [32], packs=True, known=known, written=[32])
    judge = controller.choose(outlook).judge
    assert judge is not None
    assert judge.examined([0], [[0.6] * 32], [([True] * 6 + [False] * 4) * 3 + [True] * 2])
    (count,) = judge.keep([0], [kinds_of([0.6**n for n in range(1, 7)])])
    assert count == 3, "4, if only what follows right tokens counted"


def test_kinds_of_its_own_are_not_examined():
    known = Known(by_kind=SURE[:3], evidence=8.0, asks=True, examines=True)
    controller = CostController(4, World(acceptance=0.9, reading_ms=1.0, draft_ms=1.0).costs())
    outlook = Outlook(CHAIN[:4], [0], 32.0, [60], [32], packs=True, known=known, written=[20])
    choice = controller.choose(outlook)
    assert choice.judge is not None
    assert choice.judge.examined([0], [[0.99] * 8], [[False] * 8])


def test_texts_are_not_read_for_while_others_join_the_batch():
    world = World(acceptance=0.9, reading_ms=4.0, draft_ms=0.2)
    outlook = Outlook(CHAIN, [0, 1], 32.0, [200] * 2, [32] * 2, joining=True, packs=True)
    controller = CostController(8, world.costs())
    for _ in range(3):
        assert controller.choose(outlook).budget == NO_DRAFT
    later = [controller.choose(outlook._replace(joining=False)) for _ in range(40)]
    assert any(choice.budget != NO_DRAFT for choice in later)


def test_drafters_that_hear_all_are_told_of_texts_where_it_pays():
    known = Known(by_rank=[0.8 * 0.9**i for i in range(8)], evidence=50.0)
    outlook = Outlook(CHAIN, [0], 32.0, [200], known=known)
    cheap, dear = World(reading_ms=1.0, draft_ms=0.3), World(reading_ms=1e5, draft_ms=0.3)
    assert CostController(8, cheap.costs()).follows(32, outlook)
    assert not CostController(8, dear.costs()).follows(32, outlook)
    assert not CostController(0, cheap.costs()).follows(32, outlook)


def test_hearing_comes_off_what_may_be_lost():
    steps = [StepTime(1, nodes, 32, 10.0) for nodes in (1, 2, 4, 8)]
    drafting = [DraftTime(1, nodes, 1.0 + nodes) for nodes in range(9)]
    costs = CostModel(StepCosts.fit(steps), DraftCosts.of(drafting))
    left = []
    for heard in (False, True):
        controller = CostController(8, costs)
        controller.choose(Outlook(CHAIN, [0], 32.0, [200]))
        controller.rested(1, [10.0] * 5, heard=heard)
        left.append(controller._planner.account_ms)
    assert left[0] - left[1] == pytest.approx(5 * 1.0)


def test_tokens_of_texts_that_are_behind_are_worth_more():
    world = World(row_ms=0.1, flat=1)
    controller = CostController(8, world.costs())
    outlook = Outlook(CHAIN, [0, 1, 2, 3], 32.0, [60, 60, 40, 20])
    controller.choose(outlook)

    def own_share(waiting: bool) -> float:
        return controller._planner.own_share(outlook.requests, 32.0, outlook.remaining, waiting)

    own = own_share(waiting=False)
    _, pulls = course(outlook.remaining, [[1.0]] * 4, [0.0] * 4, own)
    pull = [of_one for (of_one,) in pulls]
    assert sum(pull) == pytest.approx(4)
    assert pull[0] == pull[1] > pull[2] > pull[3] > 0
    _, alike = course(outlook.remaining, [[1.0]] * 4, [0.0] * 4, 1.0)
    assert alike == [[1.0]] * 4
    assert own_share(waiting=True) == 1 > own


@pytest.mark.parametrize("size", [1, 2, 4, 16, 32])
def test_the_last_text_of_a_batch_is_told_beforehand(size):
    """Against runs of texts that differ as they are said to."""
    rng, remaining, mean = np.random.default_rng(size), 64, 1.5
    steps = []
    for _ in range(400):
        texts = np.maximum(rng.normal(mean, TEXTS * mean, size), 0.1)
        left, count = np.full(size, float(remaining)), 0
        while left.max() > 0:
            spread = STEPS * texts
            left -= 1 + np.maximum(rng.normal(texts, spread), 0)
            count += 1
        steps.append(count)
    (told, plain), _ = course([remaining] * size, [[mean, 0.0]] * size, [0.0] * size, 0.0)
    assert told == pytest.approx(np.mean(steps), rel=0.12)
    assert plain == pytest.approx(remaining, rel=1e-3)


def test_tokens_that_bring_one_text_further_ahead_are_worth_less_to_all():
    first, *later = lead(8, 2.0)
    assert later[1] == 1
    assert all(a > b for a, b in zip([first, *later], later, strict=False))
    deep = []
    for waiting in (True, False):  # where others wait for places, all tokens are worth the same
        world = World(acceptance=0.9, sure=True, draft_ms=0.2, row_ms=0.3, flat=1)
        world.run(CostController(8, world.costs()), 400, 4, waiting=waiting)
        deep.append(median(nodes for nodes in world.chosen if nodes))
    assert deep[0] >= deep[1]


def test_drafting_that_is_all_but_free_is_judged_by_what_it_finds():
    """It asks on while nothing is found, at a bounded price, and is there when texts change."""
    world = World(acceptance=0.0, sure=True, draft_ms=0.05, row_ms=1.0)
    controller = CostController(8, world.costs())
    assert against_plain(world, controller, 300, 4) > 0.98
    assert sum(map(bool, world.chosen[100:])) < 60
    world.acceptance = 0.95
    before = len(world.chosen)
    world.run(controller, 64, 4)
    assert sum(world.chosen[before : before + 10]) > 0
    assert len(world.chosen) - before < 40


def times_asked(beside_ms: float) -> int:
    """In the time of 400 plain steps, where nothing is ever found."""
    plain_ms = 10.0
    controller = CostController(4, World(plain_ms, draft_ms=0.05).costs())
    known = Known(by_kind=SURE, evidence=8, asks=True, looks_up=True)
    asked, steps = 0, 0
    while steps < 400:
        choice = controller.choose(Outlook(CHAIN[:4], [0], 32.0, [500], packs=True, known=known))
        steps += choice.steps
        if choice.budget == NO_DRAFT:
            controller.rested(1, [plain_ms] * choice.steps, heard=False)
            continue
        asked += 1
        ms = plain_ms + 0.05 + beside_ms
        controller.observe(StepObservation(1, choice.budget, ms, [0], [[]], rows=1, draft_ms=0.05))
    return asked


def test_what_asking_takes_beside_looking_counts():
    assert times_asked(2.0) < times_asked(0.0) / 3
    assert times_asked(2.0) * 2.0 < 0.03 * 400 * 10


@pytest.mark.parametrize(("size", "packs"), [(4, True), (16, True), (4, False)])
def test_nodes_take_the_place_of_padding_where_it_is_computed(size, packs):
    controller = CostController(4, World(row_ms=0.3, flat=1).costs())
    sure, hopeless = kinds_of([0.97] * 4), kinds_of([0.02] * 4)
    outlook = Outlook(
        CHAIN[:4], list(range(size)), 32.0, [64] * size, packs=packs,
        known=Known(by_rank=[0.7] * 4, by_kind=SURE, evidence=100.0, asks=True),
    )  # fmt: skip
    choice = controller.choose(outlook)
    assert choice.budget != NO_DRAFT
    counts = choice.judge.keep(outlook.requests, [sure] + [hopeless] * (size - 1))
    if packs:
        assert counts[0] > max(counts[1:])
    else:
        assert counts == [max(counts)] * size
    assert counts[0] > 0


def test_a_new_text_brings_its_share_to_the_account_and_takes_over_what_was_gained():
    account = Account()
    account.admit([0], 100, 10.0)
    first = account.FIRST * 100 * 10
    assert account.ms == first
    account.ms = 35.0
    account.admit([0, 1], 100, 10.0)
    assert account.ms == 35, "gained by the ones before"
    account.ms = 9.0
    account.admit([1, 2], 100, 10.0)
    assert account.ms == (9 + first) / 2, "one of two is new"
    account.ms = -50.0
    assert account.may_lose(smallest=True) == 0
    account.admit([3], 100, 10.0)
    assert account.ms == first, "what was lost with others is not its debt"
    account.admit([4], 100_000, 10.0)
    assert account.ms == account.MOST * 10
    account.ms = 1e6
    account.admit([4], 100, 10.0)
    assert account.ms == account.SAVINGS * 10
    account.ms = 0.0
    account.admit([5], 1, 10.0)
    assert account.ms == 12
    account.expect(100.0, 1, 0.5)
    assert account.may_lose(smallest=False) == pytest.approx(account.STAKE * (12 + 25))


def test_what_plain_steps_save_up_is_bounded():
    """However long nothing was drafted, what may be lost at once is a few plain steps."""
    world = World(acceptance=0.0, draft_ms=1000.0)
    controller = CostController(8, world.costs())
    world.run(controller, 5000)
    assert sum(world.chosen) == 0
    controller.choose(Outlook(CHAIN, [world.first], 32.0, [64]))
    assert controller._planner.account_ms <= 1.2 * Account.SAVINGS * world.plain_ms


def test_it_says_what_it_did():
    world = World(acceptance=0.9)
    controller = CostController(8, world.costs())
    assert controller.describe()["verdict"] == "no step was decoded"
    world.run(controller, 300)
    said = controller.describe()
    assert said["steps_by_nodes"]["0"] >= 1
    assert sum(said["steps_by_nodes"].values()) == len(world.chosen)
    assert said["speedup"] == pytest.approx(300 * world.plain_ms / world.elapsed_ms, rel=0.1), (
        "as it really was"
    )
    assert "x plain decoding" in said["verdict"]
    before, steps = controller.tally(), len(world.chosen)
    assert controller.describe(before)["verdict"] == "no step was decoded"
    world.run(controller, 50)
    said = controller.describe(before)
    assert sum(said["steps_by_nodes"].values()) == len(world.chosen) - steps
    report = Report()
    report.count(0, 1, 15.0, 15.0, steps=15)
    report.count(8, 1, 2.0, 5.0)
    assert report.describe(2.114)["verdict"] == (
        "drafted in 1 of 16 steps: 2.11 x is predicted, which was not certain enough before; "
        "1.18 x plain decoding"
    )
    assert report.describe(1.0)["verdict"] == "drafted in 1 of 16 steps: 1.18 x plain decoding"
    report.count(0, 1, 30.0, 27.5, steps=15)
    assert report.describe(1.0)["verdict"] == (
        "drafting did not pay at batch 1: 1.00 x predicted; 30 of 31 steps decoded plainly"
    )
    useless = World(acceptance=0.0, draft_ms=20.0)
    controller = CostController(8, useless.costs())
    useless.run(controller, 100, 4)
    assert controller.describe()["verdict"].startswith("drafting did not pay at batch 4: ")
    before = controller.tally()
    useless.run(controller, 100, 2)
    assert "at batch 2: " in controller.describe(before)["verdict"]
    assert "at batch 4: " in controller.describe()["verdict"]


def test_steps_are_told_by_the_nodes_that_were_verified():
    controller = CostController(8)
    controller.choose(Outlook(CHAIN, [0, 1], 32.0, [64, 64]))
    for rows in (2, 3, 4, 7):  # of two sequences, of which a step drafts 8 for each at most
        walks = [[], []]
        controller.observe(StepObservation(2, Budget(8, 8), 3.0, [0, 0], walks, rows=rows))
    assert controller.describe()["steps_by_nodes"] == {"0": 1, "1": 2, "3": 1}


@pytest.mark.parametrize(
    ("given", "most"),
    [({"k": 2}, 2), ({"k": 0}, 0), ({"k": 12}, 12), ({"k": 4, "max_k": 6}, 6), ({}, 8)],
)
def test_k_bounds_it(given, most):
    fake = {"implementation": "fake", "controller": "cost", "cost_cache": False}
    assert SpeculativePipeline(**fake, **given).controller.max_k == most


def test_what_is_no_number_or_no_costs_is_refused():
    with pytest.raises(ValueError, match="max_k is '8'"):
        CostController("8")
    with pytest.raises(TypeError, match="costs is 3; it must be a CostModel, or None"):
        CostController(8, 3)


def test_with_no_room_to_draft_nothing_is_drafted():
    world = World()
    controller = CostController(0, world.costs())
    world.run(controller, 50)
    assert sum(world.chosen) == 0
    assert controller.describe()["verdict"] == "nobody drafts: 50 steps decoded plainly"


def test_a_step_that_was_cut_short_is_no_rung():
    controller = CostController(4, World().costs())
    outlook = Outlook(CHAIN[:4], [0], 32.0, [50])
    for _ in range(20):
        choice = controller.choose(outlook)
        if choice.budget != NO_DRAFT:
            controller.observe(StepObservation(1, Budget(1, 4), 3.0, [1], [[]], rows=2))
    assert sum(controller._planner.offered) == 0


def test_a_judge_hears_of_nodes_of_the_step_under_way_alone():
    outlook = Outlook(CHAIN[:4], [0, 1], 32.0, [50] * 2, known=Known(by_kind=SURE, asks=True))
    controller = CostController(4, World(acceptance=0.9, draft_ms=0.1).costs())
    judge = controller.choose(outlook).judge
    assert judge is not None
    with pytest.raises(ValueError, match="kinds has 12; the drafter named 12"):
        judge.goes_on([0, 1], [1, 12])
    with pytest.raises(ValueError, match="more nodes than the largest budget"):
        judge.keep([0, 1], [[1] * 5, [1]])
    assert judge.keep([0, 1], [[11] * 4, [11]]) == [4, 1]
    controller.observe(StepObservation(2, NO_DRAFT, 3.0, [0, 0], [[], []]))
    # A step that another pipeline's came between is not known, and not judged.
    assert not judge.goes_on([0, 1], [11, 11])
    assert judge.keep([0, 1], [[1, 1], [0]]) == [2, 1]


def test_a_controller_of_two_pipelines_in_two_threads_judges_what_it_knows():
    controller = CostController(4, World(acceptance=0.9, draft_ms=0.1).costs())
    errors = []

    def run(first: int, size: int) -> None:
        try:
            for step in range(3000):
                numbers = list(range(first + step // 50, first + step // 50 + size))
                outlook = Outlook(
                    CHAIN[:4], numbers, 32.0, [50] * size,
                    known=Known(by_kind=SURE, asks=True), packs=True,
                )  # fmt: skip
                choice = controller.choose(outlook)
                if choice.judge is not None:
                    choice.judge.goes_on(numbers, [9] * size)
                    counts = choice.judge.keep(numbers, [[9, 8]] * size)
                    assert len(counts) == size
                controller.observe(
                    StepObservation(size, choice.budget, 1.0, [2] * size, [[1]] * size)
                )
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n * 10**6, size)) for n, size in ((0, 1), (1, 7))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_a_copy_of_a_controller_begins_anew():
    world = World(acceptance=0.9)
    controller = CostController(5, world.costs())
    world.run(controller, 100)
    for copied in (copy.deepcopy(controller), pickle.loads(pickle.dumps(controller))):
        assert (copied.max_k, copied.costs) == (5, controller.costs)
        assert copied.describe()["verdict"] == "no step was decoded"


# Chances


def test_chances_follow_what_is_accepted():
    acceptance = Acceptance(SURE)
    rng = random.Random(0)
    for _ in range(200):
        kinds = [[rng.randrange(len(SURE))] for _ in range(40)]
        walks = [[1] if rng.random() < SURE[kind] ** 2 else [] for (kind,) in kinds]
        acceptance.learn(range(40), kinds, walks)
    for prior, found in zip(SURE, acceptance.chances, strict=True):
        assert found == pytest.approx(prior**2, abs=0.1)
    assert acceptance.certainty > 0.8


def test_a_drafter_that_is_never_right_loses_its_trust_in_all_kinds():
    acceptance = Acceptance(SURE)
    for _ in range(30):
        acceptance.learn([0], [[len(SURE) - 1]], [[]])
    assert acceptance.chances[len(SURE) // 2] < 0.5 * SURE[len(SURE) // 2]


def test_a_sequence_has_chances_of_its_own():
    acceptance = Acceptance([0.5])
    for _ in range(40):
        acceptance.learn([1, 2], [[0], [0]], [[1], []])
    easy, hard, new = (acceptance.of(n, [0])[0] for n in (1, 2, 3))
    assert easy > new > hard


def test_chances_fall_along_the_order_of_worth():
    assert Acceptance([0.2, 0.9]).of(0, [1, 0, 1]) == pytest.approx([0.9, 0.2, 0.2])


def test_drafts_that_were_left_out_tell_what_they_were_worth():
    """Promising drafts that are not worth a row yet come true, and are verified then; others are
    known not to."""
    counts = {}
    for right in (True, False):
        controller = CostController(4, World(draft_ms=0.01, row_ms=8.0, flat=1).costs())
        known = Known(by_kind=SURE, evidence=8, asks=True, looks_up=True)
        counts[right] = []
        for _ in range(60):
            outlook = Outlook(CHAIN[:4], [0], 32.0, [500], packs=True, known=known)
            choice = controller.choose(outlook)
            count = 0
            if choice.judge:
                choice.judge.followed([0], [[5]], [[1] if right else []])  # of the step before
                (count,) = choice.judge.keep([0], [[5]])
            counts[right].append(count)
            controller.observe(
                StepObservation(
                    1, choice.budget, 10.0 + 8.0 * count, [count], [[1] if count and right else []],
                    False, 1 + count, 0.01, True,
                )
            )  # fmt: skip
    assert counts[True][:3] == [0, 0, 0]
    assert sum(counts[True]) > 30
    assert sum(counts[False]) == 0


def test_kinds_are_in_the_order_of_chances():
    kinds = kinds_of([i / 100 for i in range(101)])
    assert kinds == sorted(kinds)
    assert (kinds[0], kinds[-1]) == (0, len(SURE) - 1)
    assert kinds_of(SURE) == list(range(len(SURE)))


def test_what_steps_of_a_sleep_took_is_what_plain_steps_take():
    controller = CostController(4, World(draft_ms=50.0).costs())
    assert controller.choose(Outlook(CHAIN[:4], [0], 32.0, [500])).budget == NO_DRAFT
    controller.rested(1, [6.0] * 20, heard=False)
    plain = StepObservation(1, NO_DRAFT, 6.0, [0], [[]], rows=1)
    assert controller._planner.observe(
        plain.batch_size, plain.budget, plain.step_ms, plain.accepted, False, 1, 0.0, False, []
    ) == pytest.approx(6.0, rel=0.05)


def test_steps_that_asked_in_vain_say_that_plain_ones_take_no_more():
    """Where looking up always seems to pay, plain steps are never seen alone: that they were
    measured to take too long must show all the same."""
    controller = CostController(4, World(10.0, draft_ms=0.05, row_ms=1.0).costs())
    known = Known(by_kind=SURE, evidence=8, asks=True, looks_up=True)
    plain = StepObservation(1, NO_DRAFT, 7.5, [0], [[]], rows=1)

    def told():
        return controller._planner.observe(
            plain.batch_size, plain.budget, plain.step_ms, [[]], False, 1, 0.0, False, []
        )

    for _ in range(30):
        choice = controller.choose(Outlook(CHAIN[:4], [0], 32.0, [500], packs=True, known=known))
        if choice.budget == NO_DRAFT:
            controller.rested(1, [7.5] * choice.steps, heard=False)
        else:
            controller.observe(
                StepObservation(1, choice.budget, 8.5, [0], [[]], rows=1, draft_ms=0.05)
            )
    assert told() == pytest.approx(7.5, rel=0.15)


@pytest.mark.parametrize("looks_up", [False, True])
def test_looking_up_is_asked_for_however_long_it_was_measured_to_take(looks_up):
    controller = CostController(4, World(draft_ms=20.0).costs())
    known = Known(by_kind=SURE, evidence=8, asks=True, looks_up=looks_up)
    choice = controller.choose(Outlook(CHAIN[:4], [0], 32.0, [50], packs=True, known=known))
    assert (choice.budget != NO_DRAFT) == looks_up


def test_a_step_behind_a_texts_reading_teaches_nothing_of_usual_ones():
    """All of it is slow: what the reading left of the target in the caches is little."""
    drafted = {}
    for slow in (1.0, 5.0):
        controller = CostController(4, World(acceptance=0.9).costs())
        drafted[slow] = []
        for text in range(6):
            outlook = Outlook(CHAIN[:4], [text], 32.0, [100])
            for _ in range(8):
                levels = controller.choose(outlook).budget.levels
                first = levels > 0 and not any(drafted[slow][8 * text :])
                drafted[slow].append(levels)
                controller.observe(
                    StepObservation(
                        1, Budget(levels, levels), (slow if first else 1.0) * 10.0 + levels,
                        [levels], [list(range(1, levels + 1))], first, 1 + levels,
                        float(levels), levels > 0,
                    )
                )  # fmt: skip
    assert sum(drafted[1.0]) > 60
    assert drafted[5.0] == drafted[1.0]


def test_equal_ladders_are_one_and_what_is_known_stays():
    controller = CostController(4, World(acceptance=0.9, draft_ms=0.1).costs())
    for step in range(40):
        ladder = tuple(CHAIN[:4])  # another tuple each time, as each engine has its own
        outlook = Outlook(ladder, [step % 2], 32.0, [500])
        levels = controller.choose(outlook).budget.levels
        controller.observe(
            StepObservation(
                1, Budget(levels, levels), 10.0 + levels, [levels],
                [list(range(1, levels + 1))], False, 1 + levels, float(levels), levels > 0,
            )
        )  # fmt: skip
    assert sum(controller._planner.offered) > 0


def test_a_judge_that_is_asked_again_after_its_no_says_no():
    controller = CostController(4, World(acceptance=0.9, draft_ms=0.1).costs())
    outlook = Outlook(CHAIN[:4], [0], 32.0, [50], known=Known(by_kind=SURE, asks=True))
    judge = controller.choose(outlook).judge
    for _ in range(100):
        last = judge.goes_on([0], [11])
    assert not last
    controller.observe(StepObservation(1, Budget(4, 4), 12.0, [4], [[1]], rows=5, draft_ms=0.4))


def test_times_that_are_no_numbers_are_not_learnt():
    world = World(acceptance=0.9)
    controller = CostController(8, world.costs())
    controller.choose(Outlook(CHAIN, [0], 32.0, [64]))
    controller.observe(StepObservation(1, Budget(1, 1), float("nan"), [1], [[]], rows=2))
    controller.rested(1, [float("nan"), float("inf")], False)
    assert against_plain(world, controller, 256, 1) > 1.5


def test_texts_that_end_a_batch_late_bound_what_is_lost():
    world = World(100, 1.0, 5.0, (1.0, 1.0, 1.0, 0.0), flat=16)
    assert against_plain(world, CostController(8, world.costs()), 256, 16) > 0.85
