"""The formula of a step's time: found again from steps it made, and kept in files."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferlab import _C
from inferlab.specdec.costs import (
    READ_BEHIND,
    CostModel,
    DraftCosts,
    DraftTime,
    StepCosts,
    StepTime,
)

GRID = [
    (batch, nodes, context)
    for batch in (1, 4, 16)
    for nodes in (1, 2, 4, 8, 16)
    for context in (32, 256)
]


def true_ms(batch: int, nodes: int, context: int, a: float, b: float, c: float) -> float:
    """Flat up to 8 rows, then so much for each."""
    rows = batch * nodes
    own = 3 + 0.2 * max(rows - 8, 0)
    return own + a * (batch - 1) + b * batch * context + c * rows * context


RATES = st.sampled_from((0.0, 1e-4, 1e-3))


@settings(max_examples=60, deadline=None)
@given(a=st.sampled_from((0.0, 0.05, 0.5)), b=RATES, c=RATES)
def test_what_was_measured_is_predicted(a, b, c):
    costs = StepCosts.fit([StepTime(*at, true_ms(*at, a, b, c)) for at in GRID])
    assert costs.error < 0.01
    for batch, nodes, context in ((2, 3, 100), (8, 6, 200), (16, 24, 64), (3, 1, 500)):
        expected = true_ms(batch, nodes, context, a, b, c)
        assert costs.ms(batch, nodes, context) == pytest.approx(expected, rel=0.12)


def test_noise_is_evened_out_and_known():
    rng = random.Random(0)
    steps = [
        StepTime(*at, true_ms(*at, 0.05, 1e-4, 1e-4) * rng.uniform(0.9, 1.1)) for at in GRID * 2
    ]
    costs = StepCosts.fit(steps)
    assert 0.01 < costs.error < 0.08
    assert min(costs.per_sequence, costs.per_key, costs.per_product, *costs.own) >= 0


def test_of_one_context_nothing_is_said_of_others():
    steps = [StepTime(b, n, 32, 3.0 + 0.1 * b * n) for b in (1, 2) for n in (1, 2, 4, 8)]
    costs = StepCosts.fit(steps)
    assert costs.ms(1, 1, 2000) == costs.ms(1, 1, 32) == pytest.approx(3.1, rel=0.05)


def test_more_rows_never_take_less():
    costs = StepCosts.fit([StepTime(1, n, 32, ms) for n, ms in ((1, 3.0), (2, 2.0), (4, 5.0))])
    times = [costs.ms(1, n, 32) for n in range(1, 12)]
    assert times == sorted(times)


@pytest.mark.parametrize("steps", [[], [StepTime(1, 0, 3, 1.0)], [StepTime(1, 1, 3, 0.0)]])
def test_steps_that_are_none_are_refused(steps):
    with pytest.raises(ValueError, match="must hold measured steps"):
        StepCosts.fit(steps)


def test_drafting_is_read_off_a_table():
    costs = DraftCosts.of(
        [DraftTime(1, 0, -0.1), DraftTime(1, 1, 1.0), DraftTime(1, 8, 8.0), DraftTime(1, 4, 3.0),
         DraftTime(4, 1, 4.0), DraftTime(4, 8, 11.0)]
    )  # fmt: skip
    assert costs.ms(1, 0) == 0
    assert costs.ms(1, 2) == pytest.approx(1 + 2 / 3)
    assert costs.ms(4, 8) == 11
    assert costs.ms(2, 8) == pytest.approx(9)
    assert costs.ms(7, 8) == pytest.approx(14)
    assert DraftCosts(()).ms(3, 3) == 0


def test_a_whole_step_drafts_and_verifies():
    step = StepCosts.fit([StepTime(1, n, 10, 2.0 + n) for n in (1, 2, 4)])
    model = CostModel(step, DraftCosts.of([DraftTime(1, 1, 0.5)]))
    assert model.ms(1, 1, 10) == pytest.approx(4.5)
    assert CostModel(step).ms(1, 0, 10) == pytest.approx(3.0)


def test_costs_are_the_same_from_a_file():
    step = StepCosts.fit([StepTime(*at, true_ms(*at, 0.1, 1e-4, 0)) for at in GRID])
    model = CostModel(step, DraftCosts.of([DraftTime(1, 1, 0.5), DraftTime(4, 1, 0.7)]))
    assert CostModel.from_json(model.to_json()) == model


def edited(**step) -> str:
    model = CostModel(StepCosts((1, 2), (1.0, 2.0)), DraftCosts(((1, ((0, 0.1),)),)))
    fields = json.loads(model.to_json())
    fields["step"] |= step
    return json.dumps(fields)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"version": 0}', '{"version": 1, "step": {}}', "[" * 100_000),
        *(edited(rows=[]), edited(own=[1.0]), edited(own=["a", 2.0]), edited(per_key=-5.0)),
        edited(own=[float("nan"), 1.0]),
        *(edited(error="abc"), edited(own=[True, 2.0]), edited(rows=[0, 2]), edited(own=[0, 0])),
        CostModel(StepCosts((1,), (1.0,))).to_json().replace('"table": []', '"table": [[1, []]]'),
    ],
    ids=lambda text: text[:12],
)
def test_what_holds_no_costs_is_refused(text):
    with pytest.raises(ValueError, match=re.compile(r"costs|version|Expecting|must", re.I)):
        CostModel.from_json(text)


def test_levels_of_a_chain_take_the_same_each():
    noisy = [DraftTime(1, 0, 0.1), DraftTime(1, 1, 1.4), DraftTime(1, 4, 2.4), DraftTime(1, 8, 5.2)]
    costs = DraftCosts.of(noisy, chains=True)
    levels = [costs.ms(1, n + 1) - costs.ms(1, n) for n in range(1, 8)]
    assert levels == pytest.approx([levels[0]] * 7)
    assert costs.ms(1, 0) == 0.1
    assert DraftCosts.of(noisy).ms(1, 4) == 2.4, "trees are not chains"


def times_of(slowed=1.0):
    return _C.planner.StepTimes(
        _C.planner.StepCosts([(1, 2.0), (8, 4.0)], 0.0, 0.0, 0.0),
        _C.planner.DraftCosts([], [], slowed),
    )


def test_a_machine_that_is_slow_now_is_slow_for_all_kinds_and_soon_again_fast():
    times = times_of()
    for _ in range(20):
        times.verified(1, 1, 2.0)
        times.verified(1, 8, 4.0)
    for _ in range(3):
        times.verified(1, 8, 8.0)
    assert times.step(1, 1) == pytest.approx(4.0, rel=0.1), "which was not timed meanwhile"
    for _ in range(3):
        times.verified(1, 8, 4.0)
    assert times.step(1, 1) == pytest.approx(2.0, rel=0.1)


def test_one_kind_that_is_off_does_not_change_the_others():
    times = times_of()
    for _ in range(40):
        times.verified(1, 1, 2.0)
        times.verified(1, 8, 6.0)
        times.verified(1, 1, 2.0)
    assert times.step(1, 1) == pytest.approx(2.0, rel=0.05)
    assert times.step(1, 8) == pytest.approx(6.0, rel=0.1)


def test_what_alone_is_taken_and_is_off_is_no_slow_machine():
    """Else plain steps would look slow wherever drafting is."""
    times = times_of()
    for _ in range(8):
        times.verified(1, 1, 2.0)
    for _ in range(20):
        times.verified(1, 8, 6.0)
    assert times.step(1, 8) == pytest.approx(6.0, rel=0.05)
    assert times.step(1, 1) == pytest.approx(2.0, rel=0.1)


def test_plain_steps_that_are_off_tell_of_those_that_draft_until_these_are_seen():
    times = times_of()
    for _ in range(20):
        times.verified(1, 1, 2.6)
    assert times.step(1, 1) == pytest.approx(2.6, rel=0.05)
    assert times.step(1, 8) == pytest.approx(4.0 * 1.3, rel=0.05)
    for _ in range(20):
        times.verified(1, 8, 4.0)
    assert times.step(1, 8) == pytest.approx(4.0, rel=0.05)
    assert times.step(1, 1) == pytest.approx(2.6, rel=0.05)


def test_one_step_alone_tells_little():
    times = times_of()
    times.verified(1, 1, 20.0)
    assert 2.0 <= times.step(1, 1) < 2.3
    times.verified(1, 1, 2.0)
    assert times.step(1, 1) == pytest.approx(2.0, rel=0.05)


def test_all_else_of_a_step_that_drafts_takes_longer():
    times = times_of(slowed=1.5)
    assert (times.step(1, 1), times.step(1, 8)) == (2.0, 6.0)
    model = CostModel(
        StepCosts((1, 2), (1.0, 2.0)), DraftCosts(((1, ((0, 0.0), (1, 0.1))),), slowed=1.5)
    )
    assert model.ms(1, 0, 0) == 1.0
    assert model.ms(1, 1, 0) == pytest.approx(3.1)
    assert CostModel.from_json(model.to_json()) == model
    with pytest.raises(ValueError, match=r"slowed is 0\.5, must be finite and at least 1"):
        DraftCosts((), slowed=0.5)


def test_more_sequences_never_take_less_to_draft_for():
    costs = DraftCosts(((4, ((0, 0.0), (4, 12.0))), (16, ((0, 0.0), (4, 4.0)))))
    assert [costs.ms(batch, 4) for batch in (1, 4, 16, 64)] == [12.0] * 4


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"rows": [\n   1,\n   2', '"rows": [\n   2,\n   1'),
        ('"error": 0.0', '"error": {}'),
        ('"table": [\n   [\n    1', '"table": [\n   [\n    -1'),
    ],
)
def test_costs_that_no_controller_can_use_are_no_costs(before, after):
    model = CostModel(StepCosts((1, 2), (1.0, 2.0)), DraftCosts(((1, ((0, 0.1),)),)))
    text = model.to_json()
    assert before in text
    with pytest.raises(ValueError, match=r"growing|no costs"):
        CostModel.from_json(text.replace(before, after))


@pytest.mark.parametrize(
    ("reading", "size"),
    [
        (((31, 10.0), (124, 40.0)), 32),  # in proportion
        (((31, 10.0), (64, 11.0), (124, 21.0)), 64),
        (((31, 10.0), (124, 11.0)), 128),  # weights are what is read
    ],
)
def test_texts_are_read_in_the_smallest_parts_that_cost_little(reading, size):
    step = StepCosts((1, 8), (1.0, 3.0))
    assert CostModel(step, reading=reading).read_at_once() == size


def test_reading_takes_what_was_measured():
    step = StepCosts((1, 64, 128), (1.0, 2.0, 5.0), per_key=0.01, per_product=0.001)
    model = CostModel(step, reading=((31, 2.0), (496, 20.0)))
    assert CostModel.from_json(model.to_json()) == model
    assert model.reading_ms(1, 31, 15) == 2.0
    assert model.reading_ms(4, 992, 60) == 40.0  # in proportion behind what was measured
    further = model.reading_ms(2, 496, READ_BEHIND + 100)
    assert further == pytest.approx(20.0 + (0.01 * 2 + 0.001 * 496) * 100)
    assert CostModel(step).reading_ms(2, 40, 10) == step.ms(2, 20, 10)  # where nothing was
    old = {k: v for k, v in json.loads(model.to_json()).items() if k != "reading"}
    assert CostModel.from_json(json.dumps(old)) == CostModel(step)
    for wrong in (((31, 2.0), (31, 3.0)), ((0, 1.0),), ((5, float("nan")),)):
        with pytest.raises(ValueError, match="reading"):
            CostModel(step, reading=wrong)
