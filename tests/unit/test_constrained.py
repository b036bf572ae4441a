"""Constraints in the engine: whoever drafts, the tokens are those of plain decoding under them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.constraints import Rule
from inferlab.models import FakeLM
from inferlab.scheduler import Request
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import EnsembleDrafter, ModelDrafter, NgramDrafter, RecyclingDrafter
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy, make_policy
from inferlab.specdec.recording import Recorder
from inferlab.specdec.tree import DraftTree, TreeShape
from inferlab.types import GenerationResult, SamplingParams

VOCAB, EOS = 512, 256
PAGES = 512
PROMPTS = [[300, 301, 302], [260], [270 + (i * i) % 60 for i in range(50)], [1, 2, 3, 300, 301]]
SAMPLED = SamplingParams(max_tokens=30, temperature=1.0, seed=5)
PARAMS = [
    SamplingParams(max_tokens=30),
    SAMPLED,
    replace(SAMPLED, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01),
    replace(SAMPLED, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3),
    replace(SAMPLED, logit_bias={300: 30.0, 301: -float("inf")}, min_tokens=20),
]
DRAFTERS = ("none", "chain", "tree", "ngram", "recycling", "ensemble")


def drafter_of(name: str, policy: Policy) -> Drafter | None:
    def model(*widths: int) -> ModelDrafter:
        draft = FakeLM(seed=3, agreement=0.7)
        return ModelDrafter(
            draft,
            draft.new_cache(PAGES),
            TreeShape.regular(widths),
            coupled=not policy.needs_draft_logits,
            keep_logits=policy.needs_draft_logits,
        )

    if name == "chain":
        return model(1, 1, 1, 1)
    if name == "tree":
        return model(3, 2, 2)
    if name == "ngram":
        return NgramDrafter(max_depth=4, branches=2)
    if name == "recycling":
        return RecyclingDrafter(VOCAB, torch.device("cpu"))
    if name == "ensemble":
        return EnsembleDrafter([model(1, 1, 1), RecyclingDrafter(VOCAB, torch.device("cpu"))])
    return None


def engine_of(
    drafter: str = "chain", *, policy: Policy | None = None, max_batch: int = 8
) -> Engine:
    policy = policy or Policy()
    target = FakeLM(seed=3)
    made = drafter_of(drafter, policy)
    cache = target.new_cache(PAGES)
    return Engine(target, cache, policy, FixedController(4), made, max_batch)


def mostly(tokens: list[int]) -> Collection[int]:
    """Three of four tokens, others behind others; end tokens behind every fifth."""
    last = tokens[-1] if tokens else 0
    allowed = {t for t in range(VOCAB) if (t * 7 + last + len(tokens)) % 4}
    return allowed | {EOS} if len(tokens) % 5 == 4 else allowed - {EOS}


def held(params: SamplingParams, index: int, rule: Callable = mostly, **more) -> Request:
    """A request for one of the prompts that is held to a rule."""
    constraint = Rule(rule, VOCAB, ends={EOS}, **more)
    return Request(PROMPTS[index % 4], params, constraint=constraint)


def requests_of(params: SamplingParams, count: int = 8) -> list[Request]:
    """Every second one is held to a rule."""
    return [
        held(replace(params, seed=i), i) if i % 2 else Request(PROMPTS[i % 4], params)
        for i in range(count)
    ]


def tokens_of(engine: Engine, requests: list[Request]) -> list[list[int]]:
    return [result.token_ids for result in engine.generate(requests)]


def one(engine: Engine, request: Request) -> GenerationResult:
    return engine.generate([request])[0]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
def test_tokens_are_those_of_plain_decoding_one_by_one(params, drafter):
    alone = engine_of("none", max_batch=1)
    expected = tokens_of(alone, requests_of(params))
    assert tokens_of(engine_of(drafter), requests_of(params)) == expected
    for tokens in expected[1::2]:
        for at, token in enumerate(tokens):
            assert token in mostly(tokens[:at])


def test_what_is_drafted_is_accepted_under_a_constraint_too():
    results = engine_of("chain").generate([held(replace(SAMPLED, seed=i), i) for i in range(8)])
    assert sum(r.stats.accepted for r in results) > 20


def test_others_in_the_batch_get_their_own_tokens():
    free = [Request(p, SAMPLED) for p in PROMPTS]
    expected = tokens_of(engine_of(), free)
    mixed = [Request(p, SAMPLED) for p in PROMPTS] + [held(SAMPLED, i) for i in range(4)]
    assert tokens_of(engine_of(), mixed)[:4] == expected


def test_drafts_are_cut_where_no_walk_comes():
    """Nothing is drafted in vain where only odd tokens may follow and only even ones are drafted:
    trees shrink to their roots."""

    class Even(NgramDrafter):
        def propose(self, batch, budget, judge=None):
            rows = torch.full((len(batch), 4), 400, dtype=torch.int32)
            rows[:, 0] = batch.roots
            return DraftTree.chains(rows, [3] * len(batch))

    def odd(tokens):
        return range(1, VOCAB, 2)

    target = FakeLM(seed=3)
    seen = []
    forward = target.forward
    target.forward = lambda b, *a: (seen.append(tuple(b.tokens.shape)), forward(b, *a))[1]
    engine = Engine(
        target, target.new_cache(PAGES), Policy(), FixedController(3), Even(max_depth=3), 4
    )
    params = SamplingParams(max_tokens=12)
    result = one(engine, held(params, 0, odd))
    assert len(result.token_ids) == 12
    assert result.stats.proposed == 0
    assert set(seen[1:]) == {(1, 1)}
    # Of two, one goes on with its whole draft.
    seen.clear()
    engine.generate([held(params, 0, odd), Request(PROMPTS[1], params)])
    assert (2, 4) in seen


@pytest.mark.parametrize("name", ["conf_threshold", "topk_agree", "typical"])
def test_lossy_policies_at_their_loosest_accept_nothing_forbidden(name):
    policy = make_policy(name, tau=0.0, k=VOCAB, p=1.0)
    for drafter in ("chain", "tree"):
        requests = [held(replace(SAMPLED, seed=i), i) for i in range(8)]
        results = engine_of(drafter, policy=policy).generate(requests)
        assert sum(r.stats.accepted for r in results) > 40
        for result in results:
            for at, token in enumerate(result.token_ids):
                assert token in mostly(result.token_ids[:at])


@pytest.mark.parametrize("drafter", ["none", "chain"])
def test_a_text_that_is_complete_ends_without_an_end_token(drafter):
    result = one(engine_of(drafter), held(SAMPLED, 0, length=7))
    assert (result.finish_reason, len(result.token_ids)) == ("stop", 7)
    # Also where it is the last token that there may be.
    exactly = one(engine_of(drafter), held(replace(SAMPLED, max_tokens=7), 0, length=7))
    assert exactly.finish_reason == "stop"


@pytest.mark.parametrize("drafter", ["none", "chain"])
def test_end_tokens_come_where_they_may(drafter):
    params = replace(SAMPLED, logit_bias={EOS: 1000.0})
    result = one(engine_of(drafter), held(params, 0))
    assert (result.finish_reason, len(result.token_ids)) == ("stop", 5)
    assert result.token_ids[-1] == EOS
    later = one(engine_of(drafter), held(replace(params, min_tokens=12), 0))
    assert (later.finish_reason, len(later.token_ids)) == ("stop", 15)


@pytest.mark.parametrize("drafter", ["none", "chain", "tree"])
@pytest.mark.parametrize("length", [None, 9])
def test_where_nothing_may_follow_the_text_ends(drafter, length):
    """Whether it is complete decides if that is an error."""

    def until_nine(tokens):
        return mostly(tokens) if len(tokens) < 9 else ()

    class Unaware(Rule):
        is_complete = False

        def may_end(self):
            return None if self.allowed(self.tokens) else length is not None

    request = Request(PROMPTS[0], SAMPLED, constraint=Unaware(until_nine, VOCAB))
    result = one(engine_of(drafter), request)
    assert len(result.token_ids) == 9
    if length is None:
        assert result.finish_reason == "error"
        assert "no token of the vocabulary is allowed" in result.error
    else:
        assert result.finish_reason == "stop"


@pytest.mark.parametrize("drafter", ["none", "chain", "tree"])
@pytest.mark.parametrize("at", [0, 4])
def test_a_constraint_that_fails_fails_its_request_alone(drafter, at):
    def breaking(tokens):
        if len(tokens) == at:
            raise RuntimeError("out of fuel")
        return range(VOCAB)

    free = [Request(p, SAMPLED) for p in PROMPTS]
    expected = tokens_of(engine_of(drafter), free)
    engine = engine_of(drafter)
    broken = held(SAMPLED, 0, breaking)
    results = engine.generate([*(Request(p, SAMPLED) for p in PROMPTS), broken])
    assert [r.token_ids for r in results[:4]] == expected
    assert results[4].finish_reason == "error"
    assert "out of fuel" in results[4].error
    assert len(results[4].token_ids) <= at
    assert engine.scheduler.allocator.num_free == PAGES


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_text_that_is_read_anew_goes_on_as_it_would_have(drafter):
    expected = tokens_of(engine_of("none"), requests_of(SAMPLED))
    engine = engine_of(drafter)
    requests = requests_of(SAMPLED)
    for request in requests:
        engine.add(request)
    step = 0
    while engine.scheduler.has_work:
        engine.step()
        step += 1
        if step % 3 == 0:
            engine.recover()
    assert [request.output for request in requests] == expected


def test_a_step_that_breaks_off_leaves_the_constraint_where_the_text_is():
    """What it was not told of it is told before it is asked again."""
    request = held(SAMPLED, 0)
    engine = engine_of("none")
    engine.add(request)
    for _ in range(4):
        engine.step()
    request.constraint.tokens.pop()
    while engine.scheduler.has_work:
        engine.step()
    assert request.output == tokens_of(engine_of("none"), [held(SAMPLED, 0)])[0]


def test_drafters_hear_of_the_targets_own_logits():
    """What is forbidden in one text is no news about the others."""
    engine = engine_of("recycling")
    seen = []
    learn = engine.drafter.commit
    engine.drafter.commit = lambda b, w: (seen.append(w.output.logits.min()), learn(b, w))[1]
    one(engine, held(SAMPLED, 0))
    assert len(seen) > 5
    assert all(lowest > -float("inf") for lowest in seen)


@pytest.mark.parametrize("drafter", ["none", "tree"])
def test_a_recorder_sees_what_was_chosen_from(drafter, tmp_path):
    engine = engine_of(drafter)
    engine.recorder = Recorder(str(tmp_path), {})
    masked = []
    look = engine.recorder.look
    engine.recorder.look = lambda b, t, o: (masked.append(o.logits.isinf().any()), look(b, t, o))
    results = tokens_of(engine, [held(replace(SAMPLED, seed=i), i) for i in range(4)])
    assert all(masked)
    expected = [held(replace(SAMPLED, seed=i), i) for i in range(4)]
    assert results == tokens_of(engine_of("none"), expected)


def test_padding_stays_forbidden():
    """A rule that allows all columns allows none of padding."""
    target = FakeLM(seed=3)
    target.tokenizer_vocab_size = 400
    engine = Engine(target, target.new_cache(PAGES), Policy(), FixedController(0), None)
    params = SamplingParams(max_tokens=40, temperature=3.0, seed=1, ignore_eos=True)
    result = one(engine, held(params, 0, lambda tokens: range(VOCAB)))
    assert max(result.token_ids) < 400


def test_cutting_a_tree_leaves_the_walks_within():
    shape = TreeShape.regular((2, 2, 1))
    tokens = torch.arange(2 * shape.num_nodes, dtype=torch.int32).view(2, -1)
    tree = DraftTree.of_shape(shape, tokens, torch.zeros(2, shape.num_nodes, 3))
    assert not tree.cut([shape.num_nodes] * 2)
    assert tree.cut([5, 2])
    assert tree.tokens.tolist() == tokens[:, :5].tolist()
    assert tree.draft_logits.shape == (2, 5, 3)
    assert tree.links.depth.tolist() == [[0, 1, 1, 2, 2], [0, 1, -1, -1, -1]]
    assert tree.links.first_child.tolist() == [[1, 3, -1, -1, -1], [1, -1, -1, -1, -1]]
    assert tree.links.next_sibling.tolist() == [[-1, 2, -1, 4, -1], [-1] * 5]
    ancestors = tree.links.ancestors[:, :, 0].tolist()
    assert ancestors == [[1, 0b11, 0b101, 0b1011, 0b10011], [1, 0b11, 0, 0, 0]]
    assert (tree.depths, tree.node_counts, tree.is_chain) == ([2, 1], [5, 2], False)
    assert tree.cut([1, 1])
    assert tree.is_chain
    assert np.array(tree.depths).tolist() == [0, 0]
