"""The bundled Medusa heads and EAGLE head serve the bundled target, and say how well."""

from __future__ import annotations

import json

import numpy as np
import pytest

from inferlab.models import loading
from inferlab.models.assets import ASSETS
from inferlab.models.draft_heads import load_eagle, load_medusa
from inferlab.training.heads import students
from inferlab.training.material.corpus import heldout_prompts
from inferlab.training.measure import dynamic_tree, heldout

NAMES = ("tiny-medusa", "tiny-eagle")
PROMPTS, NEW_TOKENS = 4, 48


@pytest.fixture(scope="module")
def loaded():
    return loading.load("inferlab/tiny", device="cpu", dtype="float32")


def texts(loaded, layers, temperature=0.0):
    prompts = [
        np.array(loaded.tokenizer(prompt).input_ids, dtype=np.int32)
        for prompt in heldout_prompts(PROMPTS)
    ]
    return heldout.write_texts(
        loaded.model, prompts, layers, new_tokens=NEW_TOKENS, temperature=temperature
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


def test_heads_load_by_name(loaded):
    medusa, eagle = (
        load("inferlab/" + name, loaded.model)
        for load, name in zip((load_medusa, load_eagle), NAMES, strict=True)
    )
    assert (medusa.hidden_size, medusa.vocab_size) == (160, 4096)
    assert eagle.config.vocab_size == 4096
    assert all(-1 <= layer < 16 for layer in eagle.feature_layers)


# Floors for a few short texts; the model cards have the measured means.


def test_medusa_heads_are_often_right(loaded):
    student = students.medusa_student(
        loaded.model, loaded.tokenizer, "inferlab/tiny", init_from="inferlab/tiny-medusa"
    )
    student.module.float().eval()
    found = heldout.measure(student.guess, texts(loaded, (-1,)), positions=3, nodes=64)
    assert found.tree > 1.8


@pytest.mark.parametrize(("temperature", "floor"), [(0.0, 3.5), (0.8, 2.8)])
def test_the_eagle_head_is_often_right(loaded, temperature, floor):
    student = students.eagle_student(
        loaded.model, loaded.tokenizer, "inferlab/tiny", init_from="inferlab/tiny-eagle"
    )
    head = student.module.float().eval()
    lengths = [
        length
        for text in texts(loaded, student.feature_layers, temperature)
        for length in dynamic_tree.accepted_lengths(head, text, nodes=31, depth=6, width=8)
    ]
    assert sum(lengths) / len(lengths) > floor
