"""Drafts in another vocabulary: the tokens of plain decoding, whatever the tokenizers."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from helpers.compare import assert_same_tokens
from helpers.fake_probabilities import next_probabilities
from helpers.paged import PagedRunner
from helpers.pairwise import pairwise
from helpers.tiny_models import tiny_model, tiny_tokenizer
from helpers.vocabularies import KINDS, permuted, reheaded, trained_tokenizer
from inferlab.models import FakeLM, ForwardBatch, ForwardOutput, HFModel, VocabularyMap
from inferlab.scheduler import Request
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Choice
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import (
    CrossVocabularyDrafter,
    Drafter,
    EnsembleDrafter,
    ModelDrafter,
)
from inferlab.specdec.drafters.cross import _Choice
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import Budget, TreeShape
from inferlab.types import SamplingParams

PAGES = 128
NEW_TOKENS = 32
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(
    max_tokens=NEW_TOKENS, temperature=0.8, top_k=50, top_p=0.9, seed=11, ignore_eos=True
)
PENALISED = SamplingParams(
    max_tokens=NEW_TOKENS,
    temperature=0.8,
    repetition_penalty=1.3,
    frequency_penalty=0.2,
    logit_bias={17: 2.0, 400: -3.0},
    min_tokens=NEW_TOKENS,
    seed=3,
)
PARAMS = pytest.mark.parametrize(
    "params", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"]
)
TEXTS = [
    "class Stack:\n    def __init__(self):\n",
    "def main(argv=None):\n    parser = argparse.ArgumentParser()\n    parser.add_argument(",
    '# caf\u00e9 \u6f22\u5b57 \U0001f600\nraise ValueError("',
]
# Half a character, the end of text in the middle, tokens in an order that no text has.
IDS = [[0, 200, 3000, 2999, 0, 130, 131, 4095, 12]]
CHAIN, TREE = TreeShape.chain(4), TreeShape.regular((3, 2, 1))
SHAPES = pytest.mark.parametrize("shape", [CHAIN, TREE], ids=["chain", "tree"])


@cache
def target() -> HFModel:
    return HFModel.load("inferlab/tiny", device="cpu", dtype="float32")


@cache
def draft_of(kind: str) -> HFModel:
    if kind == "same":
        return HFModel.load("inferlab/tiny-draft", device="cpu", dtype="float32")
    if kind == "permuted":
        return permuted("inferlab/tiny-draft")
    return reheaded("inferlab/tiny-draft", trained_tokenizer(kind))


@cache
def vocabulary_of(kind: str) -> VocabularyMap:
    return VocabularyMap.of(target(), draft_of(kind))


def prompts() -> list[list[int]]:
    return [target().tokenizer.encode(text) for text in TEXTS] + IDS


def drafter_of(kind: str, shape: TreeShape, pages: int = PAGES, **options) -> Drafter:
    draft = draft_of(kind)
    cache_of = draft.new_cache(pages)
    if kind == "same":
        return ModelDrafter(draft, cache_of, shape, **options)
    return CrossVocabularyDrafter(draft, cache_of, shape, vocabulary_of(kind), **options)


def engine(
    drafter: Drafter | None, max_batch: int = 4, policy: str = "longest_prefix", controller=None
) -> Engine:
    rule, controller = Policy(policy), controller or FixedController(4)
    return Engine(target(), target().new_cache(PAGES), rule, controller, drafter, max_batch)


_PLAIN: dict[int, list[list[int]]] = {}


def plain_tokens(params: SamplingParams) -> list[list[int]]:
    """By identity: parameters with a bias have no hash."""
    if id(params) not in _PLAIN:
        _PLAIN[id(params)] = [
            r.token_ids for r in engine(None, 1).generate([(p, params) for p in prompts()])
        ]
    return _PLAIN[id(params)]


def check(decoding: Engine, params: SamplingParams, what: str) -> tuple[int, int]:
    """Decodes all prompts and compares; returns accepted and proposed draft tokens."""
    results = decoding.generate([(p, params) for p in prompts()])
    for prompt, tokens, result in zip(prompts(), plain_tokens(params), results, strict=True):
        assert_same_tokens(target(), prompt, tokens, result.token_ids, params, what)
    drafter = decoding.drafter
    assert isinstance(drafter, Drafter)
    if isinstance(drafter, CrossVocabularyDrafter):
        assert drafter._pages.num_free == drafter.cache.num_pages
        assert not drafter._texts
    stats = [r.stats for r in results]
    return sum(s.accepted for s in stats), sum(s.proposed for s in stats)


@pairwise(
    max_batch=[1, 4],
    shape={"chain": CHAIN, "tree": TREE},
    params={"greedy": GREEDY, "sampled": SAMPLED, "penalised": PENALISED},
)
def test_shuffled_ids_are_drafted_as_well_as_before(max_batch, shape, params):
    what = f"permuted, {shape.num_nodes} nodes, batch {max_batch}"
    same = check(engine(drafter_of("same", shape), max_batch), params, "one vocabulary")
    assert check(engine(drafter_of("permuted", shape), max_batch), params, what) == same
    if params is GREEDY:
        accepted, proposed = same
        assert accepted > 0.35 * proposed


@pytest.mark.parametrize("max_batch", [1, 4])
def test_the_target_itself_with_shuffled_ids_is_always_right(max_batch):
    draft = permuted("inferlab/tiny", seed=1)
    vocabulary = VocabularyMap.of(target(), draft)
    drafter = CrossVocabularyDrafter(draft, draft.new_cache(PAGES), CHAIN, vocabulary)
    accepted, proposed = check(engine(drafter, max_batch), SAMPLED, "the target, permuted")
    assert accepted == proposed > 0


@pytest.mark.parametrize(
    ("way", "params", "max_batch"),
    [
        ("tokens", GREEDY, 1),
        ("tokens", SAMPLED, 4),
        ("text", GREEDY, 4),
        ("text", SAMPLED, 1),
        ("text", PENALISED, 4),
        ("auto", GREEDY, 1),
        ("auto", SAMPLED, 4),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_other_tokenizers_change_no_token(kind, way, max_batch, params):
    decoding = engine(drafter_of(kind, CHAIN, way=way), max_batch)
    accepted, _ = check(decoding, params, f"{kind}, {way}, batch {max_batch}")
    if params is not PENALISED:
        assert accepted > 0, "the draft never agreed: nothing was tested"


@PARAMS
@pytest.mark.parametrize("kind", KINDS)
def test_trees_of_other_tokenizers_change_no_token(kind, params):
    accepted, _ = check(engine(drafter_of(kind, TREE, way="tokens")), params, f"{kind}, tree")
    assert accepted > 0


class Restless(FixedController):
    """Drafts now and then, and never the same."""

    def __init__(self) -> None:
        super().__init__(4)
        self._turn = 0

    def choose(self, outlook):
        self._turn += 1
        budgets = (Budget(4, 9), Budget(0, 0), Budget(2, 3), Budget(1, 1), Budget(0, 0))
        return Choice(budgets[self._turn % 5])


@pytest.mark.parametrize("params", [GREEDY, PENALISED], ids=["greedy", "penalised"])
@SHAPES
@pytest.mark.parametrize("kind", ["permuted", "unigram"])
def test_steps_without_a_draft_are_caught_up(kind, shape, params):
    decoding = engine(drafter_of(kind, shape), 2, controller=Restless())
    accepted, _ = check(decoding, params, f"{kind}, restless")
    assert accepted > 0


@pytest.mark.parametrize("params", [GREEDY, PENALISED], ids=["greedy", "penalised"])
@SHAPES
@pytest.mark.parametrize("way", ["tokens", "text"])
def test_who_finds_no_pages_is_not_drafted_for(way, shape, params):
    """Eight pages hold two of the four sequences, later more of them."""
    decoding = engine(drafter_of("permuted", shape, pages=8, way=way))
    counts: list[tuple[int, ...]] = []
    drafter = decoding.drafter
    propose = drafter.propose

    def watched(batch, budget, judge=None):
        tree = propose(batch, budget)
        counts.append(tuple(tree.node_counts))
        return tree

    drafter.propose = watched
    accepted, _ = check(decoding, params, "few pages")
    assert accepted > 0
    assert any(1 in nodes and max(nodes) > 1 for nodes in counts if len(nodes) == 4)


@SHAPES
@pytest.mark.parametrize("way", ["tokens", "text"])
def test_with_other_drafters_its_cache_stays_right(way, shape):
    """What the cache is said to hold is what it holds: the draft's logits are those without it."""
    other = drafter_of("same", TreeShape.regular((4, 1)))
    drafter = drafter_of("permuted", shape, way=way)
    fresh = draft_of("permuted")
    read, compared = drafter._read, []

    def watched(ground, texts):
        logits = read(ground, texts)
        for row, text in enumerate(texts):
            alone = PagedRunner(fresh).chain([text.ids])[0, -1]
            assert torch.allclose(logits[row, 0], alone, atol=1e-3)
            compared.append(len(text.ids))
        return logits

    drafter._read = watched
    check(engine(EnsembleDrafter([other, drafter])), SAMPLED, f"ensemble, {way}")
    assert len(compared) > 20


def test_nothing_is_drafted_beyond_the_drafts_context():
    draft = HFModel(tiny_model("gpt2"), tiny_tokenizer(), name="short")
    assert draft.context_length == 128
    drafter = CrossVocabularyDrafter(
        draft, draft.new_cache(PAGES), CHAIN, VocabularyMap.of(target(), draft), way="text"
    )
    decoding = engine(drafter, 1)
    params = SamplingParams(max_tokens=100, ignore_eos=True)
    (prompt,) = prompts()[:1]
    plain = engine(None, 1).generate([(prompt, params)])[0].token_ids
    result = decoding.generate([(prompt, params)])[0]
    assert_same_tokens(target(), prompt, plain, result.token_ids, params, "short context")
    assert 0 < result.stats.proposed < 4 * result.stats.steps


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece"])
def test_text_is_drafted_no_deeper_than_asked(kind):
    """Where the draft's tokens are shorter than the target's it writes more of them."""
    decoding = engine(drafter_of(kind, TREE, way="text"), controller=FixedController(2))
    drafter, depths = decoding.drafter, []
    propose = drafter.propose

    def watched(batch, budget, judge=None):
        tree = propose(batch, budget)
        depths.extend(tree.depths)
        return tree

    drafter.propose = watched
    check(decoding, GREEDY, f"{kind}, two levels")
    assert max(depths) == 2


def test_a_tree_that_is_given_up_is_forgotten():
    """A step that fails behind `propose` leaves no tree for the next one's commit."""
    drafter = drafter_of("permuted", TREE, way="tokens")
    request = Request(prompts()[0], GREEDY, request_id=0, pages=[0])
    batch = Batch([request], target().device, ())
    drafter.propose(batch, Budget(3, 99))
    assert drafter._tree is not None
    drafter._has_room = lambda text: False
    assert drafter.propose(batch, Budget(3, 99)).num_nodes == 1
    assert drafter._tree is None
    del drafter._has_room
    drafter.propose(batch, Budget(3, 99))
    drafter.release(request)
    assert drafter._tree is None


class Scribe:
    """A draft model that knows what will be written: the id behind position p is that of p + 1."""

    def __init__(self, tokenizer, text: str) -> None:
        self.name = "scribe"
        self.tokenizer = tokenizer
        self.vocab_size = self.tokenizer_vocab_size = len(tokenizer)
        self.context_length = None
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.eos_token_ids = ()
        self.num_parameters = 0
        self.quantization = None
        self._ids = torch.tensor(tokenizer.encode(text))
        self.new_cache = FakeLM(64).new_cache

    def notice_changes(self) -> None:
        pass

    def forward(self, batch: ForwardBatch, cache, layers=()) -> ForwardOutput:
        positions = batch.positions
        if batch.scored is not None:
            positions = positions.reshape(-1, 1)[batch.scored]
        ids = self._ids[(positions + 1).clamp_max(len(self._ids) - 1).long()]
        return ForwardOutput(torch.nn.functional.one_hot(ids, self.vocab_size).float() * 50)


def scribe_acceptance(kind: str, way: str, params: SamplingParams) -> float:
    """Share of accepted tokens where the draft writes what the target will write."""
    accepted = proposed = 0
    for prompt, tokens in list(zip(prompts(), plain_tokens(params), strict=True))[:2]:
        text = target().tokenizer.decode([*prompt, *tokens])
        scribe = Scribe(trained_tokenizer(kind), text)
        vocabulary = VocabularyMap.of(target(), scribe)
        drafter = CrossVocabularyDrafter(
            scribe, scribe.new_cache(PAGES), CHAIN, vocabulary, way=way
        )
        result = engine(drafter, 1).generate([(prompt, params)])[0]
        assert_same_tokens(target(), prompt, tokens, result.token_ids, params, way)
        accepted += result.stats.accepted
        proposed += result.stats.proposed
    return accepted / proposed


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", ["byte_bpe", "unigram", "sentencepiece_bpe"])
def test_what_the_draft_writes_is_understood(kind, params):
    """By text nearly all that it says, by tokens only what both have a token for."""
    by_text = scribe_acceptance(kind, "text", params)
    by_tokens = scribe_acceptance(kind, "tokens", params)
    assert by_text > 0.35
    assert by_text > 3 * by_tokens
    assert scribe_acceptance(kind, "auto", params) > 1.2 * by_tokens


def test_the_better_way_is_found_and_the_other_tried_again():
    choice = _Choice()
    choice.way = "tokens"
    used = []
    for _ in range(60):
        used.append(choice.next())
        choice.learn(3 if used[-1] == "text" else 1)
    assert used[:4] == ["tokens"] * 4
    assert used.count("text") > 40
    assert "tokens" in used[10:]
    for _ in range(200):
        used.append(choice.next())
        choice.learn(1 if used[-1] == "text" else 3)
    assert used[-40:].count("tokens") > 30


def test_where_all_tokens_are_shared_there_is_no_choice():
    assert drafter_of("permuted", CHAIN).way == "tokens"
    assert drafter_of("byte_bpe", CHAIN).way == "auto"
    drafter = drafter_of("byte_bpe", CHAIN)
    check(engine(drafter), GREEDY, "auto")
    assert set(drafter.describe()["kept_per_step"]) == {"tokens", "text"}
    assert drafter.describe()["vocabulary_shared"] < 0.5


def test_rejection_over_shared_tokens_keeps_the_greedy_tokens():
    drafter = drafter_of("byte_bpe", TREE, coupled=False, keep_logits=True)
    accepted, _ = check(engine(drafter, policy="rejection"), GREEDY, "rejection")
    assert accepted > 0


def test_rejection_over_shared_tokens_keeps_the_distribution():
    """Ten of the target's words the draft does not have; its ids are shifted by none."""
    model, draft = FakeLM(340, seed=2), FakeLM(330, seed=2, agreement=0.4)
    prompt, temperature, draws = [300, 301, 302], 1.3, 4000
    drafter = CrossVocabularyDrafter(
        draft,
        draft.new_cache(512, 8),
        TreeShape.regular((3,)),
        VocabularyMap.of(model, draft),
        coupled=False,
        keep_logits=True,
    )
    rule = Policy("rejection")
    decoding = Engine(model, model.new_cache(512, 8), rule, FixedController(1), drafter, 128)
    requests = [
        (prompt, SamplingParams(max_tokens=3, temperature=temperature, seed=seed))
        for seed in range(draws)
    ]
    # The first token is the target's own, drawn when it reads the prompt; the second is drafted.
    params = SamplingParams(max_tokens=3, temperature=temperature)
    first = next_probabilities(model, prompt, params)
    expected = np.zeros(340)
    for token in np.nonzero(first > 1e-4)[0]:
        expected += first[token] * next_probabilities(model, [*prompt, int(token)], params)
    expected *= draws / expected.sum()
    counts = np.zeros(340)
    for result in decoding.generate(requests):
        counts[result.token_ids[1]] += 1
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    means = np.append(expected[common], expected[~common].sum())
    statistic = ((observed - means) ** 2 / np.maximum(means, 1e-9))[means > 1].sum()
    assert counts[330:].sum() > 0
    assert chi2.sf(statistic, (means > 1).sum() - 1) > 1e-3


def test_what_cannot_be_drafted_is_refused():
    draft = draft_of("byte_bpe")
    with pytest.raises(ValueError, match="way is 'letters'"):
        drafter_of("byte_bpe", CHAIN, way="letters")
    with pytest.raises(ValueError, match="rejection policy needs"):
        drafter_of("byte_bpe", CHAIN, way="text", coupled=False, keep_logits=True)
    nothing = VocabularyMap(
        target().tokenizer,
        target().tokenizer,
        target_size=target().vocab_size,
        draft_size=draft.vocab_size,
    )
    nothing.target_to_draft.fill_(-1)
    with pytest.raises(ValueError, match="share no token"):
        CrossVocabularyDrafter(draft, draft.new_cache(1), CHAIN, nothing, way="tokens")
    assert CrossVocabularyDrafter(draft, draft.new_cache(1), CHAIN, nothing).way == "text"
