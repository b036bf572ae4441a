"""Acceptance by depth and rank: counted over walks, kept beside the weights."""

import json
import random

import pytest

from inferlab import cli
from inferlab.specdec.calibration import AcceptanceCounts, measured_acceptance, write_acceptance
from inferlab.specdec.tree import TreeShape


def test_rates_of_a_known_drafter_are_found():
    shape = TreeShape.regular([3, 2, 2])
    rates = [[0.5, 0.2, 0.1], [0.4, 0.3], [0.6, 0.1]]
    counts, rng = AcceptanceCounts(shape), random.Random(5)
    children: dict[int, list[int]] = {}
    for node in range(1, shape.num_nodes):
        children.setdefault(shape.parents[node], []).append(node)
    for _ in range(20_000):
        node, walk = 0, []
        while node in children:
            options = rates[shape.depths[node]]
            rest = 1 - sum(options)
            rank = rng.choices(range(len(options) + 1), [*options, rest])[0]
            if rank == len(options):
                break
            node = children[node][rank]
            walk.append(shape.ranks[node])
        counts.add(walk)
    for found, wanted in zip(counts.rates(), rates, strict=True):
        assert found == pytest.approx(wanted, abs=0.02)


def test_what_was_hardly_seen_is_left_out():
    counts = AcceptanceCounts(TreeShape.chain(2))
    for _ in range(30):
        counts.add([])
    assert counts.rates() == [[0.0]]


def test_rates_lie_beside_the_weights(tmp_path):
    assert measured_acceptance(str(tmp_path)) is None
    write_acceptance(tmp_path, [[0.51234, 0.1], [0.4]], {"prompts": 3})
    assert measured_acceptance(str(tmp_path)) == [[0.5123, 0.1], [0.4]]
    assert json.loads((tmp_path / "acceptance.json").read_text())["prompts"] == 3


@pytest.mark.parametrize("text", ["[", "{}", '{"acceptance": [[2]]}', '{"acceptance": [3]}'])
def test_a_broken_file_is_named(tmp_path, text):
    (tmp_path / "acceptance.json").write_text(text)
    with pytest.raises(ValueError, match=r"acceptance\.json"):
        measured_acceptance(str(tmp_path))


def test_too_few_steps_to_measure_anything_write_nothing(tmp_path, capsys):
    argv = ["calibrate", "--impl", "fake", "--num-prompts", "1", "--max-tokens", "1"]
    assert cli.main([*argv, "--output", str(tmp_path)]) == 2
    assert "--num-prompts: 1 prompts of 1 tokens were too few" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flag",
    ["--tree optimal", "--tree-nodes 9", "--tree-width 2", "--controller cost", "--adaptive-K",
     "--min-k 1", "--max-k 4", "--target-acceptance 0.5"],
)  # fmt: skip
def test_flags_that_say_how_much_to_draft_are_refused(tmp_path, capsys, flag):
    argv = ["calibrate", "--impl", "fake", *flag.split(), "--output", str(tmp_path)]
    assert cli.main(argv) == 2
    assert f"{flag.split()[0]}: has no meaning here" in capsys.readouterr().err


def test_a_name_on_the_hub_has_none():
    assert measured_acceptance("somebody/something") is None
