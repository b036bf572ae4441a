"""The `rejection` policy through the whole engine: the distribution is the target's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.constraints import Rule
from helpers.fake_probabilities import next_probabilities
from inferlab.kernels import SamplingTensors
from inferlab.models import FakeLM, VocabularyMap
from inferlab.scheduler import Request
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import CrossVocabularyDrafter, Drafter, ModelDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import TreeShape
from inferlab.types import SamplingParams

VOCAB = 5
PROMPT = [1, 3, 2]
TEMPERATURE = 1.3
DRAWS = 3000
# Requests begin with an output of one token, each token as often, so that penalties count from the
# first draft on; two are drafted behind it, as a fourth, not counted, is still to come. Or they are
# fresh, and the first two are drafted.
PLAIN = SamplingParams(max_tokens=4, temperature=TEMPERATURE)
CHANGED = {
    "bias": replace(PLAIN, logit_bias={4: 2.0, 0: -1.5}),
    "repetition": replace(PLAIN, repetition_penalty=2.5),
    "presence": replace(PLAIN, presence_penalty=2.0),
    "frequency": replace(PLAIN, frequency_penalty=2.0),
    # The draft's favourite is forbidden as second and third token, or as second alone.
    "banned": replace(PLAIN, min_tokens=3, stop_token_ids=(4,)),
    "banned_once": replace(PLAIN, min_tokens=2, stop_token_ids=(4,)),
    "all": replace(
        PLAIN,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.5,
        logit_bias={4: 1.0, 2: 0.7},
        min_tokens=2,
        stop_token_ids=(0,),
        top_k=4,
    ),
}
CHAIN, TREE = (1, 1), (3, 2)
WIDTHS = pytest.mark.parametrize("widths", [CHAIN, TREE], ids=["chain", "tree"])


def allowed_behind(output: Sequence[int]) -> set[int]:
    """A grammar: three of the five tokens, others behind others."""
    last = output[-1] if output else 0
    return {(last + step) % VOCAB for step in (0, 1, 3)}


def expected_triples(model: FakeLM, params: SamplingParams, held: bool = False) -> np.ndarray:
    """P(first, second, third new token), [V, V, V].

    Args:
        held: to `allowed_behind`.
    """

    def behind(*output: int) -> np.ndarray:
        forbidden = set(range(VOCAB)) - allowed_behind(output) if held else set()
        bias = dict(params.logit_bias or {}) | dict.fromkeys(forbidden, -np.inf)
        return next_probabilities(model, PROMPT, replace(params, logit_bias=bias), output)

    table = np.zeros((VOCAB,) * 3)
    first = behind()
    for a in np.flatnonzero(first):
        second = behind(a)
        for b in np.flatnonzero(second):
            table[a, b] = first[a] * second[b] * behind(a, b)
    return table


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """The p-value of ``counts`` under probabilities ``expected``; 0 where the impossible came."""
    if counts[expected == 0].any():
        return 0.0
    means = np.sort(expected * counts.sum(), axis=None)
    observed = counts.flatten()[np.argsort(expected, axis=None)]
    # The rarest are added up, so that each cell expects at least five.
    rare = max((means < 5).sum(), np.searchsorted(means.cumsum(), 5) + 1)
    mean = np.append(means[:rare].sum(), means[rare:])
    seen = np.append(observed[:rare].sum(), observed[rare:])
    freedom = len(mean) - 1
    return float(chi2.sf(((seen - mean) ** 2 / mean).sum(), freedom)) if freedom else 1.0


def p_values(
    engine: Engine, kinds: list[SamplingParams], draws: int = DRAWS, held: bool = False
) -> list[float]:
    """One for each kind of request. Requests of all kinds take turns, so they share batches.

    The first token comes without a draft, the second and the third are drafted.
    """
    requests = [
        Request(PROMPT, replace(kinds[i % len(kinds)], seed=i)) for i in range(draws * len(kinds))
    ]
    if held:
        for request in requests:
            request.constraint = Rule(allowed_behind, VOCAB)
    counts = np.zeros((len(kinds), VOCAB, VOCAB, VOCAB))
    for i, result in enumerate(engine.generate(requests)):
        counts[(i % len(kinds), *result.token_ids[:3])] += 1
    model = engine.target
    assert isinstance(model, FakeLM)
    return [
        chi_square(seen, expected_triples(model, kind, held))
        for seen, kind in zip(counts, kinds, strict=True)
    ]


def p_value(engine: Engine, params: SamplingParams = PLAIN, held: bool = False) -> float:
    return p_values(engine, [params], held=held)[0]


def engine_of(drafter: Drafter | None, depth: int = 2, policy: str = "rejection") -> Engine:
    target = FakeLM(VOCAB, seed=2)
    controller = FixedController(depth)
    cache = target.new_cache(512, 8)
    engine = Engine(target, cache, Policy(policy), controller, drafter, max_batch=128)
    engine._may_ride = lambda plan, told: False  # drafts for all, also while others are read
    return engine


def rejection_engine(
    widths: tuple[int, ...], drafter_class: type[ModelDrafter] = ModelDrafter, seed: int = 2
) -> Engine:
    draft = FakeLM(VOCAB, seed=seed, agreement=0.4)
    drafter = drafter_class(
        draft,
        draft.new_cache(512, 8),
        TreeShape.regular(widths),
        coupled=False,
        keep_logits=True,
    )
    return engine_of(drafter, len(widths))


def letters(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each letter."""
    tokenizer = Tokenizer(models.BPE({letter: id_ for id_, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def cross_engine(widths: tuple[int, ...], pages: int = 512) -> Engine:
    """The draft has seven ids; four of them are tokens of the target's, in another order."""
    theirs = "xdbyeaz"
    draft = FakeLM(len(theirs), seed=2)
    drafter = CrossVocabularyDrafter(
        draft,
        draft.new_cache(pages, 8),
        TreeShape.regular(widths),
        VocabularyMap(letters("abcde"), letters(theirs)),
        coupled=False,
        keep_logits=True,
    )
    return engine_of(drafter, len(widths))


@WIDTHS
def test_the_distribution_is_the_targets(widths):
    assert p_value(rejection_engine(widths)) > 1e-3


class Misaligned(ModelDrafter):
    """Hands on each level's logits one node late."""

    def propose(self, batch, budget, judge=None):
        tree = super().propose(batch, budget, judge)
        if tree.draft_logits is not None:
            tree.draft_logits = tree.draft_logits.roll(1, dims=1)
        return tree


def test_draft_logits_of_the_wrong_node_are_caught():
    assert p_value(rejection_engine(CHAIN, Misaligned)) < 1e-6


def test_what_is_expected_is_what_plain_decoding_does():
    kinds = [replace(kind, max_tokens=3) for kind in (PLAIN, *CHANGED.values())]
    assert min(p_values(engine_of(None), kinds, 1000)) > 1e-3


@WIDTHS
@pytest.mark.parametrize("kind", CHANGED)
def test_changed_logits_keep_the_distribution(kind, widths):
    assert p_value(rejection_engine(widths), CHANGED[kind]) > 1e-3


@WIDTHS
@pytest.mark.parametrize("kind", CHANGED)
def test_drafts_drawn_with_penalties_are_caught(kind, widths, monkeypatch):
    monkeypatch.setattr(SamplingTensors, "without_penalties", lambda self: self)
    assert p_value(rejection_engine(widths), CHANGED[kind]) < 1e-6


@WIDTHS
@pytest.mark.parametrize("kind", ["plain", "bias", "all"])
def test_a_grammar_keeps_the_distribution(kind, widths):
    params = (CHANGED | {"plain": PLAIN})[kind]
    assert p_value(rejection_engine(widths, seed=9), params, held=True) > 1e-3


def test_drafts_that_are_kept_from_being_rejected_are_caught(monkeypatch):
    """A forbidden draft token is a try that failed: without it the others come too often."""
    monkeypatch.setattr(Policy, "needs_draft_logits", False)
    assert p_value(rejection_engine(CHAIN, seed=9), held=True) < 1e-6


@pytest.mark.full
@WIDTHS
def test_changed_logits_keep_the_distribution_in_many_draws(widths):
    """1e5 in batches of all kinds."""
    kinds = list(CHANGED.values())
    assert min(p_values(rejection_engine(widths), kinds, 100_000 // len(kinds))) > 1e-3


@settings(max_examples=12, deadline=None)
@given(
    widths=st.sampled_from(((1,), CHAIN, (2, 1), TREE, (5,))),
    params=st.builds(
        SamplingParams,
        max_tokens=st.just(4),
        temperature=st.floats(0.6, 2),
        top_k=st.sampled_from((0, 2, 4)),
        top_p=st.sampled_from((1.0, 0.9, 0.6)),
        repetition_penalty=st.sampled_from((1.0, 0.7, 2.0)),
        presence_penalty=st.floats(-1, 2),
        frequency_penalty=st.floats(-1, 2),
        logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-3, 3), max_size=3),
    ),
    banned=st.sampled_from((0, 2, 3)),
)
def test_any_changes_together_keep_the_distribution(widths, params, banned):
    if banned:
        params = replace(params, min_tokens=banned, stop_token_ids=(4,))
    assert p_value(rejection_engine(widths), params) > 1e-4


MIXED = [PLAIN, CHANGED["bias"], CHANGED["repetition"], CHANGED["all"]]


@WIDTHS
def test_sequences_with_and_without_penalties_share_a_batch(widths):
    assert min(p_values(rejection_engine(widths), MIXED, 1500)) > 1e-3


@pytest.mark.parametrize(
    ("widths", "pages", "scarce"),
    [(CHAIN, 512, False), (TREE, 512, False), (CHAIN, 96, True), (TREE, 192, True)],
    ids=["chain", "tree", "chain_of_some", "tree_of_some"],
)
def test_drafts_in_another_vocabulary_keep_the_distribution(widths, pages, scarce):
    """Where pages are scarce, a part of a batch is not drafted for."""
    decoding = cross_engine(widths, pages)
    drafter, partly = decoding.drafter, []
    assert drafter is not None
    propose = drafter.propose

    def watched(batch, budget, judge=None):
        tree = propose(batch, budget)
        partly.append(min(tree.node_counts) == 1 < max(tree.node_counts))
        return tree

    drafter.propose = watched
    assert min(p_values(decoding, MIXED, 1500)) > 1e-3
    assert any(partly) == scarce


def test_drafts_in_another_vocabulary_drawn_with_penalties_are_caught(monkeypatch):
    monkeypatch.setattr(SamplingTensors, "without_penalties", lambda self: self)
    plain, *changed = p_values(cross_engine(TREE), MIXED, 1500)
    assert plain > 1e-3
    assert max(changed) < 1e-6


@WIDTHS
def test_other_policies_draft_with_the_targets_penalties(widths):
    """The target as its own draft guesses every token, where penalties do not look at the path."""
    draft = FakeLM(VOCAB, seed=2)
    drafter = ModelDrafter(draft, draft.new_cache(512, 8), TreeShape.regular(widths))
    requests = [
        (PROMPT, replace(CHANGED[kind], seed=seed))
        for kind in ("bias", "banned")
        for seed in range(50)
    ]
    results = engine_of(drafter, policy="longest_prefix").generate(requests)
    assert {(r.stats.proposed, r.stats.accepted) for r in results} == {(2, 2)}
