"""Controllers by name, and those that do not plan."""

import random

import pytest

from inferlab.specdec.control import Outlook, StepObservation
from inferlab.specdec.controllers import AdaptiveController, FixedController, make_controller
from inferlab.specdec.tree import Budget

OUTLOOK = Outlook(ladder=(), requests=[0])


def run(controller, acceptance: float, steps: int) -> None:
    rng = random.Random(0)
    for _ in range(steps):
        budget = controller.choose(OUTLOOK).budget
        accepted = 0
        while accepted < budget.levels and rng.random() < acceptance:
            accepted += 1
        walk = list(range(1, accepted + 1))
        controller.observe(StepObservation(1, budget, 10.0, [budget.levels], [walk]))


def test_fixed_never_moves():
    controller = FixedController(3)
    run(controller, 0.0, 20)
    assert controller.choose(OUTLOOK).budget.levels == 3


@pytest.mark.parametrize(("acceptance", "expected"), [(1.0, 6), (0.0, 2)])
def test_adaptive_goes_to_its_bounds(acceptance, expected):
    controller = AdaptiveController(min_k=2, max_k=6, target_acceptance=0.7)
    run(controller, acceptance, 30)
    assert controller.choose(OUTLOOK).budget.levels == expected


def test_adaptive_ignores_steps_without_drafts():
    controller = AdaptiveController(min_k=1, max_k=8)
    before = controller.choose(OUTLOOK)
    controller.observe(StepObservation(1, Budget(4, 4), 1.0, [0], [[]]))
    assert controller.choose(OUTLOOK) == before


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
