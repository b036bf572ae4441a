"""Texts that lose their pages and are read anew, chunks beside decoding: the same tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.compare import assert_same_tokens
from inferlab import SpeculativePipeline
from inferlab.models import FakeLM, HFModel
from inferlab.scheduler import Request
from inferlab.specdec.batch import Batch
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import Drafter, ModelDrafter, NgramDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import Budget, DraftTree, TreeShape
from inferlab.types import SamplingParams

MODES = ("none", "vanilla", "ngram", "recycling", "self", "medusa", "eagle", "ensemble")
TEXTS = [
    "import os\n\n\ndef main(",
    "x",
    "class Stack:\n    def push(self, item):\n" * 8,
    "for i in",
]
PARAMS = [
    SamplingParams(max_tokens=40, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=0.8, top_p=0.9, seed=3),
    SamplingParams(max_tokens=25, temperature=0.7, repetition_penalty=1.2, seed=9, min_tokens=20),
    SamplingParams(max_tokens=35, temperature=1.0, frequency_penalty=0.3, seed=4),
]


def run(
    engine: Engine,
    requests: list[Request],
    rng: random.Random,
    chance: float,
    cancelled: Sequence[Request] = (),
) -> None:
    """To the end, with random requests preempted between random steps; they come in any order.

    Args:
        cancelled: requests that are cancelled at some time.
    """
    coming = [*requests, *cancelled]
    rng.shuffle(coming)
    while coming or engine.scheduler.has_work:
        while coming and rng.random() < 0.5:
            engine.add(coming.pop())
        for request in list(engine.scheduler.running):
            if rng.random() < chance:
                engine.scheduler.preempt(request)
        for request in cancelled:
            if rng.random() < 0.1:
                engine.abort(request.request_id)
        engine.scheduler.read_tokens = rng.choice((1, 3, 16, 40, 512))
        engine.step()


def hold_to_budgets(drafter: Drafter) -> None:
    """Has every proposal checked: no more levels and nodes than were asked for."""
    propose = drafter.propose

    def checked(batch: Batch, budget: Budget, judge: object = None) -> DraftTree:
        tree = propose(batch, budget)
        assert max(tree.depths) <= budget.levels
        assert max(tree.node_counts) <= 1 + budget.nodes
        return tree

    drafter.propose = checked


@cache
def target() -> HFModel:
    return HFModel.load("inferlab/tiny", device="cpu")


@cache
def expected() -> list[list[int]]:
    pipeline = SpeculativePipeline(target=target(), draft_mode="none", max_batch=1)
    prompts = [target().tokenizer.encode(text) for text in TEXTS]
    return [r.token_ids for r in pipeline.engine.generate(zip(prompts, PARAMS, strict=True))]


@pytest.mark.parametrize("tree", [False, True], ids=["own tree", "branches"])
@pytest.mark.parametrize("mode", MODES)
def test_a_text_that_is_read_anew_goes_on_as_it_would_have(mode, tree):
    branches = {"vanilla": (2, 2, 1), "ngram": (2, 1, 1), "self": (2, 2), "eagle": (2, 2, 1)}
    if tree and mode not in branches:
        pytest.skip("has one kind of tree")
    rng = random.Random(f"{mode} {tree}")
    pipeline = SpeculativePipeline(
        target=target(), draft_mode=mode, tree=branches[mode] if tree else None, max_batch=3
    )
    engine = pipeline.engine
    if engine.drafter is not None:
        hold_to_budgets(engine.drafter)
    for levels in (2, 6):
        engine.controller = FixedController(levels)
        prompts = [target().tokenizer.encode(text) for text in TEXTS]
        requests = [Request(p, params) for p, params in zip(prompts, PARAMS, strict=True)]
        run(engine, requests, rng, 0.2)
        for request, tokens in zip(requests, expected(), strict=True):
            assert_same_tokens(
                target(), list(request.prompt), tokens, request.output, request.params, mode
            )
        assert engine.scheduler.allocator.num_free == engine.cache.num_pages


@pytest.mark.parametrize("mode", MODES)
def test_few_pages_and_shared_beginnings_change_no_token(mode):
    rng = random.Random(mode)
    pipeline = SpeculativePipeline(
        target=target(), draft_mode=mode, max_batch=4, num_pages=40, share_prefixes=True
    )
    engine = pipeline.engine
    engine.controller = FixedController(3)
    begin = target().tokenizer.encode(TEXTS[2])
    prompts = [begin[: rng.randrange(40, 140)] + target().tokenizer.encode(t) for t in TEXTS * 2]
    params = [PARAMS[i % len(PARAMS)] for i in range(len(prompts))]
    alone = SpeculativePipeline(target=target(), draft_mode="none", max_batch=1).engine
    expected = [r.token_ids for r in alone.generate(zip(prompts, params, strict=True))]
    requests = [Request(p, params) for p, params in zip(prompts, params, strict=True)]
    run(engine, requests, rng, 0.02)
    for request, tokens in zip(requests, expected, strict=True):
        assert_same_tokens(
            target(), list(request.prompt), tokens, request.output, request.params, mode
        )
    assert engine.scheduler.allocator.num_free == 40
    assert sum(r.num_preempted for r in requests) > 0
    assert sum(r.num_shared for r in requests) > 100


@pytest.mark.parametrize("mode", ["vanilla", "medusa", "eagle", "ensemble"])
def test_drafts_behind_a_shared_beginning_are_those_behind_one_that_was_read(mode):
    """As many are accepted: the drafter's own K/V of the pages is that of its own reading."""
    prompts = [TEXTS[2] + text for text in ("    def pop(self", "x = 1\n", "    def push(self, x")]
    accepted = []
    for shares in (False, True):
        pipeline = SpeculativePipeline(
            target=target(), draft_mode=mode, max_batch=1, share_prefixes=shares
        )
        pipeline.engine.controller = FixedController(3)
        results = [pipeline.generate(prompt, max_tokens=40) for prompt in prompts * 2]
        accepted.append([r["accepted"] for r in results])
        if shares:
            again = pipeline.engine.add(pipeline.request(prompts[0]))
            pipeline.engine.step()
            assert again.num_shared >= len(again.prompt) - 17
    assert accepted[1] == accepted[0]


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    seed=st.integers(0, 2**32),
    chance=st.sampled_from((0.0, 0.1, 0.5)),
    drafter=st.sampled_from(("none", "chain", "tree", "ngram")),
    page_size=st.sampled_from((1, 4, 16)),
    max_batch=st.integers(1, 5),
    room=st.sampled_from((96, 160, 512)),
    shares=st.booleans(),
)
def test_any_order_of_coming_reading_preempting_and_cancelling(
    lengths, seed, chance, drafter, page_size, max_batch, room, shares
):
    rng = random.Random(seed)
    model = FakeLM(seed=7)
    pages = room // page_size
    draft = FakeLM(seed=7, agreement=0.6)
    shape = TreeShape.regular((2, 2, 1)) if drafter == "tree" else TreeShape.chain(3)
    made = {
        "none": None,
        "ngram": NgramDrafter(4, branches=2),
    }.get(drafter, ModelDrafter(draft, draft.new_cache(pages, page_size), shape))
    begin = [[rng.randrange(260, 512) for _ in range(70)] for _ in range(2)]
    prompts = []
    for length in lengths:
        alike = rng.randrange(length + 1)
        own = [rng.randrange(260, 512) for _ in range(length - alike)]
        prompts.append([*rng.choice(begin)[:alike], *own])
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=seed)
    plain = Engine(model, model.new_cache(128), Policy(), FixedController(0), max_batch=1)
    expected = [r.token_ids for r in plain.generate([(p, params) for p in prompts])]
    cache = model.new_cache(pages, page_size)
    engine = Engine(
        model, cache, Policy(), FixedController(3), made, max_batch, shares_prefixes=shares
    )
    requests = [Request(p, params, priority=rng.randrange(3)) for p in prompts]
    cancelled = [Request(p, params, priority=rng.randrange(3)) for p in prompts[:2]]
    run(engine, requests, rng, chance, cancelled)
    assert [r.output for r in requests] == expected
    assert engine.scheduler.allocator.num_free == pages
