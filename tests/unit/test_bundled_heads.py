"""The bundled Medusa heads and EAGLE head serve the bundled target, and say how well."""

from __future__ import annotations

import json

import pytest

from inferlab.models import HFModel
from inferlab.models.assets import ASSETS
from inferlab.models.draft_heads import load_eagle, load_medusa
from inferlab.training.material.corpus import heldout_prompts
from inferlab.training.measure.acceptance import Trial

NAMES = ("tiny-medusa", "tiny-eagle")
PROMPTS, NEW_TOKENS = 4, 48


@pytest.fixture(scope="module")
def target():
    return HFModel.load("inferlab/tiny", device="cpu", dtype="float32")


def trial(target, name, temperature=0.0):
    prompts = [target.tokenizer(prompt).input_ids for prompt in heldout_prompts(PROMPTS)]
    mode = {"tiny-draft": "vanilla", "tiny-medusa": "medusa", "tiny-eagle": "eagle"}[name]
    return Trial(
        target, mode, ASSETS / name, prompts, new_tokens=NEW_TOKENS, temperature=temperature
    )


def test_heads_are_small_together():
    files = [path for name in NAMES for path in (ASSETS / name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20


@pytest.mark.parametrize("name", NAMES)
def test_report_is_complete(name):
    report = json.loads((ASSETS / name / "training.json").read_text(encoding="utf-8"))
    card = (ASSETS / name / "README.md").read_text(encoding="utf-8")
    assert report["command"] in card
    assert {entry["temperature"] for entry in report["acceptance"]} == {0.0, 0.8}
    for entry in report["acceptance"]:
        assert (entry["prompts"], entry["new_tokens"]) == (20, 128)
        assert f"{entry['tree']:.2f}" in card


def test_heads_load_by_name(target):
    medusa, eagle = (
        load("inferlab/" + name, target.model)
        for load, name in zip((load_medusa, load_eagle), NAMES, strict=True)
    )
    assert (medusa.hidden_size, medusa.vocab_size) == (160, 4096)
    assert eagle.config.vocab_size == 4096
    assert all(-1 <= layer < 16 for layer in eagle.feature_layers)


# Floors for a few short texts; the model cards have the measured means.


def test_the_draft_is_often_right(target):
    assert trial(target, "tiny-draft").chains(4).length > 2.5


def test_medusa_heads_are_often_right(target):
    medusa = trial(target, "tiny-medusa")
    assert medusa.static(medusa.rates(3, 64), levels=3, nodes=64) > 1.8


@pytest.mark.parametrize(("temperature", "floor"), [(0.0, 3.5), (0.8, 2.8)])
def test_the_eagle_head_is_often_right(target, temperature, floor):
    assert trial(target, "tiny-eagle", temperature).grown(levels=6, nodes=31) > floor
