"""Are draft nodes accepted as often as predicted: the diagram, and the models that predict."""

import random

import numpy as np
import pytest

from inferlab import cli
from inferlab.specdec.acceptance import (
    SURE,
    UNKNOWN,
    Acceptance,
    Known,
    Ranks,
    kinds_of,
    kinds_of_logs,
)
from inferlab.specdec.control import Outlook, StepObservation
from inferlab.specdec.tree import Budget
from inferlab.training.measure.reliability import PredictingController, Reliability

CALIBRATE = ["calibrate", "--impl", "fake", "--reliability"]


def test_the_error_is_the_distance_bin_by_bin():
    found = Reliability()
    for step in range(10):
        found.add([0.95, 0.25, 1.0], [1, 2] if step < 5 else [1])
    assert found.nodes == 30
    low, high = found.bins[2], found.bins[9]
    assert (low.low, low.nodes, low.predicted, low.accepted) == (0.2, 10, 0.25, 0.5)
    assert (high.high, high.nodes) == (1.0, 20)
    assert (high.predicted, high.accepted) == pytest.approx((0.975, 0.5))
    assert found.error() == pytest.approx((10 * 0.25 + 20 * 0.475) / 30)
    assert found.error(0.5) == pytest.approx(0.475)
    assert Reliability().error() == 0.0


def chains(truth, steps, requests, own=lambda request: 1.0, levels=4, seed=1):
    """Chains whose nodes' chances a draft claims to know; ``truth``: of what it claims."""
    rng = random.Random(seed)
    for _ in range(steps):
        kinds, walks = [], []
        for request in range(requests):
            path, real, walk = 1.0, 1.0, []
            of_nodes = []
            for level in range(1, levels + 1):
                path *= rng.choice((0.3, 0.6, 0.9, 0.97))
                of_nodes.append(path)
                chance = truth(path)
                chance = min(chance * own(request) / (1 + chance * (own(request) - 1)), real)
                if len(walk) == level - 1 and rng.random() < chance / real:
                    walk.append(level)
                real = chance
            kinds.append(kinds_of(of_nodes))
            walks.append(walk)
        yield kinds, walks


@pytest.mark.parametrize(
    "truth",
    [lambda p: p, lambda p: p**2, lambda p: p**0.5, lambda p: 0.5 * p, lambda p: 0.0],
    ids=["honest", "boasting", "modest", "half", "useless"],
)
@pytest.mark.parametrize("requests", [1, 8])
def test_chances_of_a_known_draft_are_found(truth, requests):
    acceptance, found = Acceptance(SURE), Reliability()
    for kinds, walks in chains(truth, 1600 // requests, requests):
        for request in range(requests):
            found.add(acceptance.of(request, kinds[request]), walks[request])
        acceptance.learn(range(requests), kinds, walks)
    assert found.error() <= 0.05


def test_texts_that_go_better_than_others_are_told_apart():
    """Half of the texts have four times the odds, half a quarter."""
    acceptance, together, apart = Acceptance(SURE), Reliability(), Reliability()
    for kinds, walks in chains(lambda p: p, 300, 8, lambda r: 4.0 if r % 2 else 0.25):
        for request in range(0, 8, 2):
            apart.add(acceptance.of(request, kinds[request]), walks[request])
            together.add(acceptance.of(99, kinds[request]), walks[request])
        acceptance.learn(range(8), kinds, walks)
    assert apart.error() < 0.75 * together.error()


def test_chances_by_rank_are_found():
    ranks, found, rng = Ranks(6, (0.9, 0.9)), Reliability(), random.Random(3)
    truth = (0.6, 0.3, 0.15, 0.1, 0.05, 0.02)
    for _ in range(1000):
        walk = [rank for rank, chance in enumerate(truth, start=1) if rng.random() < chance]
        found.add(ranks.chances, walk)
        ranks.learn(6, [walk])
    assert found.error() <= 0.05


def test_kinds_told_by_logs_are_those_told_by_chances():
    chances = np.concatenate([np.linspace(0, 1, 997), np.logspace(-12, 0, 200), [1.0]])
    with np.errstate(divide="ignore"):
        logs = np.maximum(np.log(chances), -1e30)
    assert kinds_of_logs(logs.astype(np.float64)).tolist() == kinds_of(chances.tolist())


def decode(controller, known, ladder, steps):
    """Two texts whose first draft token is right half of the time, the others never."""
    rng = random.Random(5)
    for _ in range(steps):
        choice = controller.choose(Outlook(ladder, [0, 1], known=known))
        kinds = [[9, 6, 3], [9, 6]]
        if choice.judge is not None:
            assert choice.judge.goes_on([0, 1], [9, 9])
            assert choice.judge.keep([0, 1], kinds) == [3, 2]
        walks = [[1] if rng.random() < 0.5 else [] for _ in kinds]
        controller.observe(StepObservation(2, Budget(3, 3), 1.0, [3, 2], walks))


def test_a_step_is_predicted_before_it_is_learnt_from():
    ladder = [Budget(k, k) for k in (1, 2, 3)]
    for known, nodes in ((Known(by_kind=SURE), 5), (UNKNOWN, 6)):
        controller = PredictingController(3)
        decode(controller, known, ladder, 1)
        assert controller.found.nodes == nodes
        first = SURE[9] if known.by_kind else Ranks.HOPE
        of_first = controller.found.bins[int(first * 10)]
        assert (of_first.nodes, of_first.predicted) == (2, pytest.approx(first))
        decode(controller, known, ladder, 300)
        assert controller.found.error() <= 0.08


def test_the_command_prints_and_draws(tmp_path, capsys):
    plot = tmp_path / "found.png"
    argv = [*CALIBRATE, "--num-prompts", "3", "--max-tokens", "20", "--K", "3"]
    assert cli.main([*argv, "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "vanilla: 3 held-out prompts of 20 tokens, temperature 0"
    assert lines[1].split() == ["chance", "nodes", "predicted", "accepted", "off"]
    assert len(lines) == 13
    assert lines[-1].startswith("expected calibration error: 0.")
    total = sum(int(line.split()[3]) for line in lines[2:12])
    assert f"over {total} nodes" in lines[-1]
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "x"], "--output: has no meaning beside --reliability"),
        (["--controller", "cost"], "--controller: has no meaning here"),
        (["--draft-mode", "none"], "--draft-mode: 'none' drafts nothing"),
        (["--K", "0"], "--K: 0 drafts nothing that may be accepted; must be at least 1"),
        (["--plot", "x.foo"], "--plot: x.foo must end in .svg or .png or .pdf"),
        (["--plot", "missing/x.png"], "--plot: missing/x.png: its directory does not exist"),
    ],
)
def test_flags_that_mean_nothing_are_refused(argv, message, capsys):
    assert cli.main([*CALIBRATE, *argv]) == 2
    assert message in capsys.readouterr().err


def test_a_plot_of_nothing_is_refused(tmp_path, capsys):
    assert cli.main(["calibrate", "--output", str(tmp_path), "--plot", "x.png"]) == 2
    assert "--plot: has no meaning without --reliability" in capsys.readouterr().err
