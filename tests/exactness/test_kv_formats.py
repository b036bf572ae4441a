"""Targets whose K/V is kept in 8 bits: speculation gives the tokens of their own plain decoding."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from helpers.decoding import GREEDY, PENALISED, PROMPTS, SAMPLED, engine_of
from helpers.pairwise import pairwise
from helpers.tiny_models import FAMILIES, MIXTURES, tiny_model
from inferlab import SpeculativePipeline
from inferlab.models import FakeLM, ForwardBatch, HFModel
from inferlab.specdec.cost_cache import model_facts

FORMATS = ("int8", "fp8")


@cache
def target_of(family: str, stored: str, engine: str = "auto") -> HFModel:
    return HFModel(tiny_model(family), kv_cache_dtype=stored, engine=engine)


@pairwise(
    family=[*FAMILIES, *MIXTURES],
    stored=list(FORMATS),
    drafter=["vanilla", "ngram"],
    tree={"chain": False, "tree": True},
    params={"greedy": GREEDY, "sampled": SAMPLED, "penalised": PENALISED},
)
def test_speculation_changes_no_token(family, stored, drafter, tree, params):
    target = target_of(family, stored)
    asked = [(prompt, params) for prompt in PROMPTS]
    plain = [r.token_ids for r in engine_of(target, "none", False, 1).generate(asked)]
    for batch in (1, 5):
        results = engine_of(target, drafter, tree, batch).generate(asked)
        assert [r.token_ids for r in results] == plain


def logits_of(model: HFModel, tokens: list[int], at_once: int) -> torch.Tensor:
    """Read in parts of so many tokens."""
    cache, found = model.new_cache(4), []
    pages = torch.arange(4, dtype=torch.int32)[None]
    for begin in range(0, len(tokens), at_once):
        part = torch.tensor([tokens[begin : begin + at_once]])
        lens = torch.tensor([begin], dtype=torch.int32)
        positions = begin + torch.arange(part.shape[1])[None]
        found.append(model.forward(ForwardBatch(part, positions, lens, pages), cache).logits[0])
    return torch.cat(found)


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
@pytest.mark.parametrize("stored", FORMATS)
def test_logits_are_near_those_of_the_model_and_the_same_however_it_is_read(family, stored):
    own = logits_of(target_of(family, stored), PROMPTS[3], 64)
    assert torch.equal(own, logits_of(target_of(family, stored), PROMPTS[3], 5))
    modules = logits_of(target_of(family, stored, "hf"), PROMPTS[3], 64)
    plain = logits_of(target_of(family, "auto"), PROMPTS[3], 64)
    assert not torch.equal(own, plain)
    for other in (plain, modules):
        off = (own - other).square().mean().sqrt() / plain.std()
        assert off < (0.04 if stored == "int8" else 0.15) * (3 if family in MIXTURES else 1)


@pytest.mark.parametrize("mode", ["vanilla", "ngram", "eagle", "medusa", "self", "recycling"])
@pytest.mark.parametrize("stored", FORMATS)
def test_every_drafter_of_the_bundled_models_agrees_with_plain_decoding(mode, stored):
    settings = {"dtype": "bfloat16", "cost_cache": False, "kv_cache_dtype": stored}
    plain = SpeculativePipeline(draft_mode="none", **settings)
    pipeline = SpeculativePipeline(draft_mode=mode, k=3, target=plain.target, **settings)
    prompts = ["def add(a, b):\n", "class Point:\n    def __init__(self", "import os\nimport"]
    for sampling in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 3}):
        expected = [r["token_ids"] for r in plain.generate(prompts, 24, **sampling)]
        results = pipeline.generate(prompts, 24, **sampling)
        assert [r["token_ids"] for r in results] == expected
    assert sum(r["accepted"] for r in results) > 0
    assert results[0]["dtype"] == f"bfloat16, {stored} K/V"


def test_texts_that_begin_alike_share_pages_of_8_bits():
    settings = {"kv_cache_dtype": "int8", "cost_cache": False}
    alone = SpeculativePipeline(draft_mode="ngram", **settings)
    shared = SpeculativePipeline(draft_mode="ngram", share_prefixes=True, **settings)
    start = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self"
    prompts = [start + end for end in (", item):", ", x):", "):")]
    expected = [alone.generate(prompt, 20)["token_ids"] for prompt in prompts]
    assert [shared.generate(prompt, 20)["token_ids"] for prompt in prompts] == expected


def test_costs_are_kept_by_the_format_of_the_pages():
    facts = [model_facts(target_of("llama", stored)) for stored in ("auto", *FORMATS)]
    assert len({str(f) for f in facts}) == 3


def test_a_model_that_was_loaded_otherwise_is_refused():
    target = HFModel.load("inferlab/tiny")
    with pytest.raises(ValueError, match=r"kv_cache_dtype is 'int8', but target is a model whose"):
        SpeculativePipeline(target=target, kv_cache_dtype="int8")
    with pytest.raises(ValueError, match="kv_cache_dtype is 'int2'; it must be auto"):
        HFModel.load("inferlab/tiny", kv_cache_dtype="int2")
    with pytest.raises(ValueError, match="kv_cache_dtype"):
        SpeculativePipeline(implementation="fake", kv_cache_dtype="int8")
    assert FakeLM().kv_cache_dtype == "auto"
