"""What a checkpoint's generation_config changes: both sides alike, or none, with a word."""

from __future__ import annotations

import json
import logging
from functools import cache

import pytest
import torch

from helpers.tiny_models import tiny_model, tiny_tokenizer
from inferlab.baseline import LocalBaselineRunner
from inferlab.benchmarks.runners import GenerateRunner
from inferlab.models import HFModel
from inferlab.models.generation_defaults import not_followed
from inferlab.specdec.pipeline import SpeculativePipeline

PROMPT = "the draft model"
COUNT = 24


def plain(**entries) -> list[int]:
    """By `generate`, with nothing but these entries set."""
    model = tiny_model("llama")
    ids = torch.tensor([tiny_tokenizer().encode(PROMPT)])
    options = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0, **entries}
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return output[0, ids.shape[1] :].tolist()


@cache
def first() -> int:
    return plain()[0]


FOLLOWED = {
    "suppress_tokens": lambda: [first(), 3, 10**6],
    "bad_words_ids": lambda: [[first()], [1]],  # 1 ends a text, which is not forbidden
    "sequence_bias": lambda: [[[first()], -100.0], [[9], 2.0]],
}
NOT_FOLLOWED = {
    "bad_words_ids": lambda: [[first()], plain()[:2]],
    "sequence_bias": lambda: [[plain()[:2], -100.0]],
    "num_beams": lambda: 3,
    "forced_eos_token_id": lambda: 1,
    "exponential_decay_length_penalty": lambda: (1, 9.0),
    "encoder_repetition_penalty": lambda: 30.0,
    "repetition_penalty": lambda: 1.9,
    "no_repeat_ngram_size": lambda: 1,
    "begin_suppress_tokens": lambda: [first()],
}


@pytest.fixture
def folder(tmp_path):
    def write(**entries):
        tiny_model("llama").save_pretrained(tmp_path)
        file = tmp_path / "generation_config.json"
        file.write_text(json.dumps({"eos_token_id": 1, **entries}))
        tiny_tokenizer().save_pretrained(tmp_path)
        return str(tmp_path)

    return write


def both_sides(folder: str, **options) -> list[list[int]]:
    """Tokens of the baseline, of the engine with and without drafts, of the bench's `generate`."""
    baseline = LocalBaselineRunner(model_name=folder, device="cpu", **options)
    runs = [baseline.run(PROMPT, COUNT, temperature=0)]
    target = None
    for mode in ("none", "recycling"):
        pipeline = SpeculativePipeline(
            base_model=folder,
            draft_mode=mode,
            device="cpu",
            max_new_tokens=COUNT,
            target=target,
            **options,
        )
        target = pipeline.target
        runs.append(pipeline.generate(PROMPT))
    assert isinstance(pipeline.target, HFModel)
    runs.append(GenerateRunner(pipeline.target, pipeline.config).run(PROMPT))
    return [run["token_ids"] for run in runs]


@pytest.mark.parametrize("name", FOLLOWED)
def test_biases_on_single_tokens_are_followed(folder, name, caplog):
    value = FOLLOWED[name]()
    expected = plain(**{name: value})
    assert expected != plain()
    with caplog.at_level(logging.WARNING, "inferlab"):
        assert both_sides(folder(**{name: value})) == [expected] * 4
    assert "generation_config" not in caplog.text


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_the_rest_changes_nothing_and_is_named(folder, name, caplog):
    value = NOT_FOLLOWED[name]()
    assert plain(**{name: value}) != plain()
    path = folder(**{name: value})
    with caplog.at_level(logging.WARNING, "inferlab"):
        assert both_sides(path) == [plain()] * 4
    warnings = [r.getMessage() for r in caplog.records if "generation_config" in r.getMessage()]
    assert len(warnings) == 2  # a model for either side
    assert all(f"sets {name}, which neither" in warning for warning in warnings)


def test_all_of_it_can_be_ignored(folder, caplog):
    path = folder(suppress_tokens=[first()], num_beams=3, top_k=2)
    with caplog.at_level(logging.WARNING, "inferlab"):
        assert both_sides(path, ignore_generation_config=True) == [plain()] * 4
    assert "generation_config" not in caplog.text


def test_a_callers_bias_is_added(folder):
    pipeline = SpeculativePipeline(
        base_model=folder(suppress_tokens=[first()]), draft_mode="none", device="cpu"
    )
    second = plain(suppress_tokens=[first()])[0]
    bias = {second: -100.0, first(): 100.0}
    token = pipeline.generate(PROMPT, 1, logit_bias=bias)["token_ids"][0]
    assert token not in (first(), second)


def test_ordinary_checkpoints_are_not_spoken_of():
    assert not_followed(tiny_model("llama")) == ()
