"""Medusa and EAGLE with random heads: no token changes, and every draft is what the head says."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch

from helpers.compare import assert_same_tokens
from helpers.decoding import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    Sleepy,
    needs_gpu,
    plain_tokens,
    target_of,
    trees_of,
)
from helpers.pairwise import pairwise
from helpers.repeat_graphs import Repeat
from helpers.tiny_models import tiny_model
from inferlab.models import HFModel
from inferlab.models.draft_heads import EagleHead, MedusaHeads, PagedEagle, eagle_config
from inferlab.specdec.control import Choice
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import Drafter, EagleDrafter, MedusaDrafter
from inferlab.specdec.drafters.captured import DraftGraphs
from inferlab.specdec.engine import Engine
from inferlab.specdec.planner import CostController
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import NO_DRAFT, Budget, TreeShape
from inferlab.types import SamplingParams

PAGES = 128
PENALISED = SamplingParams(
    max_tokens=30, temperature=0.9, repetition_penalty=1.2, logit_bias={7: 1.5}, seed=4,
    ignore_eos=True,
)  # fmt: skip
TREE = TreeShape.best([[0.5, 0.2, 0.1], [0.4, 0.2]], nodes=14, depth=3)


def medusa_heads(target: HFModel) -> MedusaHeads:
    head = target.model.get_output_embeddings()
    vocab, hidden = head.weight.shape
    heads = MedusaHeads(3, 1, hidden, vocab, target_head=head)
    return _random(heads, 1).to(target.device, target.dtype)


@cache
def eagle_head(family: str, version: int, reduced: bool = False, device: str = "cpu") -> EagleHead:
    target = target_of(family, device)
    changes: dict[str, Any] = {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    if reduced:
        changes["draft_vocab_size"] = 60
    layers = (0, 1, -1) if version == 3 else (-1,)
    config = eagle_config(target.config, **changes)
    head = EagleHead(config, version, target.model, feature_layers=layers)
    if reduced:
        head.draft_to_target = torch.arange(60) * 2 + 5
    return _random(head, 2).to(device)


def _random(module: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 1.5 * scale * noise)
    return module.eval().requires_grad_(False)


@cache
def written_out(family: str) -> HFModel:
    """The target once more: to tell its hidden states transformers hooks a model for good, and the
    fused layers do not stand in for one with hooks."""
    return HFModel(tiny_model(family))


class Checked(EagleDrafter):
    """Compares every draft with the whole-sequence forward of its head."""

    checks = 0

    def propose(self, batch, budget, judge=None):
        tree = super().propose(batch, budget, judge)
        for row, sequence in enumerate(batch.requests):
            self._check_chain(sequence.tokens, tree, row)
        return tree

    def _check_chain(self, tokens, tree, row):
        """Follows the first children and compares each with the head's arg-max."""
        head = self.head.head
        with written_out(self.family).plain() as model, torch.inference_mode():
            out = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        last = out.hidden_states[-1]
        layers = [last if i == -1 else out.hidden_states[i + 1] for i in head.feature_layers]
        embeds = head.embed(torch.tensor([tokens[1:]]))
        features = torch.cat(layers, dim=-1)[:, :-1]
        known = head.enter(embeds, features)
        node, hidden = 0, None
        first_child, sibling = tree.links.first_child[row], tree.links.next_sibling[row]
        for _ in range(self.max_depth):
            hidden = _continue(head, known)
            logits = head.logits(hidden)[0, -1]
            child = int(first_child[node])
            if child < 0:
                return
            best = logits.topk(2).values
            drafted = []
            while child >= 0:
                drafted.append(int(tree.tokens[row, child]))
                child = int(sibling[child])
            if best[0] - best[1] > 1e-3:
                assert drafted[0] == int(logits.argmax()), "the draft is not the head's choice"
                type(self).checks += 1
            node = int(first_child[node])
            embed = head.embed(tree.tokens[row, node].long()[None, None])
            own = head.enter(embed, hidden[:, -1:])
            known = tuple(torch.cat(pair, dim=1) for pair in zip(known, own, strict=True))


def _continue(head, entered):
    x, residual = entered
    positions = torch.arange(x.shape[1])[None]
    return head.layer.finish(residual, head.layer.self_attn(x, head.rotary(x, positions)))


def drafter_of(kind: str, family: str, tree: bool, device: str = "cpu") -> Drafter:
    target = target_of(family, device)
    shape = {"static": TREE, True: None, False: TreeShape.chain(3)}[tree]
    if kind == "medusa":
        return MedusaDrafter(medusa_heads(target), shape, nodes=14)
    head = eagle_head(family, int(kind[-1]), kind.startswith("reduced"), device)
    paged = PagedEagle(head)
    made = Checked(paged, paged.new_cache(PAGES, 16), shape, depth=3, width=4, nodes=14)
    made.family = family
    return made


KINDS = ["medusa", "eagle1", "eagle3", "reduced eagle3"]


@pairwise(
    family=["llama", "gpt2", "gemma2"],
    kind=KINDS,
    tree={"chain": False, "tree": True, "static": "static"},
    params={"greedy": GREEDY, "sampled": SAMPLED},
)
def test_heads_change_no_token(family, kind, tree, params):
    target = target_of(family)
    expected = plain_tokens(family, params)
    for batch, controller in ((1, FixedController(3)), (5, Sleepy(3)), (2, CostController(3))):
        drafter = drafter_of(kind, family, tree)
        if params is SAMPLED and isinstance(drafter, Checked):
            drafter._check_chain = lambda *_: None  # the check is for arg-max drafts
        engine = Engine(
            target, target.new_cache(PAGES), Policy(), controller, drafter, max_batch=batch
        )
        results = engine.generate([(p, params) for p in PROMPTS])
        for prompt, tokens, result in zip(PROMPTS, expected, results, strict=True):
            what = f"{family}, {kind}, tree {tree}, batch {batch}"
            assert_same_tokens(target, prompt, tokens, result.token_ids, params, what)
        assert engine.scheduler.allocator.num_free == PAGES


@pairwise(
    kind=KINDS,
    tree={"chain": False, "tree": True, "static": "static"},
    params={"greedy": GREEDY, "sampled": SAMPLED, "penalised": PENALISED},
    batch=[1, 3],
)
def test_replayed_drafts_are_those_of_ordinary_calls(kind, tree, params, batch):
    """Each tree of a run, and what is kept between its steps: replays read and write elsewhere."""
    seen, repeats = [], Repeat()
    for capture in (None, repeats):
        drafter = drafter_of(kind, "llama", tree)
        drafter._check_chain = lambda *_: None
        drafter._graphs = DraftGraphs(torch.device("cpu"), capture)
        trees = trees_of(drafter)
        target = target_of("llama")
        engine = Engine(
            target, target.new_cache(PAGES), Policy(), FixedController(3), drafter, max_batch=batch
        )
        engine.generate([(p, params) for p in PROMPTS])
        seen.append(trees)
    assert seen[0] == seen[1]
    assert len(seen[0]) > repeats.replays > len(seen[0]) // 2
    assert repeats.captures <= 8  # a few shapes


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tree", [True, "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_drafts_from_graphs(kind, tree):
    target, trees = target_of("llama", "cuda"), []
    for captures in (True, False):
        drafter = drafter_of(kind, "llama", tree, "cuda")
        drafter._check_chain = lambda *_: None
        if not captures:
            drafter._graphs._graphs.can_capture = False
        seen = trees_of(drafter)
        engine = Engine(
            target, target.new_cache(PAGES), Policy(), FixedController(3), drafter, max_batch=2
        )
        results = engine.generate([(p, GREEDY) for p in PROMPTS])
        expected = plain_tokens("llama", GREEDY, "cuda")
        for prompt, tokens, result in zip(PROMPTS, expected, results, strict=True):
            assert_same_tokens(target, prompt, tokens, result.token_ids, GREEDY, kind)
        trees.append(seen)
        assert (len(drafter._graphs._graphs._graphs) > 0) == captures
    assert trees[0] == trees[1]


def test_drafts_were_compared_with_the_heads():
    before = Checked.checks
    target = target_of("llama")
    drafter = drafter_of("eagle3", "llama", True)
    engine = Engine(target, target.new_cache(PAGES), Policy(), Sleepy(3), drafter, max_batch=3)
    long = SamplingParams(max_tokens=60, ignore_eos=True)
    engine.generate([(p, long) for p in PROMPTS])
    assert Checked.checks - before > 100


def test_a_long_sleep_is_caught_up_in_pieces(monkeypatch):
    import inferlab.specdec.drafters.eagle as module

    monkeypatch.setattr(module, "MOST_PENDING", 5)
    target = target_of("llama")
    drafter = drafter_of("eagle1", "llama", False)
    engine = Engine(target, target.new_cache(PAGES), Policy(), RarelyAwake(3), drafter, 3)
    long = SamplingParams(max_tokens=60, ignore_eos=True)
    results = engine.generate([(p, long) for p in PROMPTS])
    plain = Engine(target, target.new_cache(PAGES), Policy(), FixedController(0))
    for prompt, result in zip(PROMPTS, results, strict=True):
        (expected,) = plain.generate([(prompt, long)])
        assert_same_tokens(target, prompt, expected.token_ids, result.token_ids, long, "sleepy")


@pairwise(kind=KINDS, params={"greedy": GREEDY, "sampled": SAMPLED}, batch=[1, 4])
def test_trees_that_a_judge_cuts_change_no_token(kind, params, batch):
    target, controller = target_of("llama"), Choosy(3)
    drafter = drafter_of(kind, "llama", True)
    drafter._check_chain = lambda *_: None  # they may be cut to the root
    engine = Engine(target, target.new_cache(PAGES), Policy(), controller, drafter, batch)
    results = engine.generate([(p, params) for p in PROMPTS])
    for prompt, tokens, result in zip(PROMPTS, plain_tokens("llama", params), results, strict=True):
        assert_same_tokens(target, prompt, tokens, result.token_ids, params, kind)
    assert {0, 1} < controller.kept


class Choosy(FixedController):
    """Keeps some of each tree, and looks at what it is told of it."""

    def __init__(self, k):
        super().__init__(k)
        self.kept, self.random = set(), random.Random(2)

    def choose(self, outlook):
        assert outlook.known.by_kind
        return super().choose(outlook)._replace(judge=self)

    def keep(self, requests, kinds):
        assert len(requests) == len(kinds)
        assert all(of == sorted(of, reverse=True) for of in kinds)  # the surest first
        counts = [self.random.choice((0, 1, 3, len(of_nodes))) for of_nodes in kinds]
        self.kept |= set(counts)
        return counts


class RarelyAwake(Sleepy):
    def choose(self, outlook):
        self.step += 1
        return Choice(Budget(3, 3) if self.step % 19 == 0 else NO_DRAFT)


class GivingUp(FixedController):
    """Drafts in three steps of each batch, then no more."""

    def choose(self, outlook):
        assert outlook.able is None or outlook.able  # it is not asked where there is nobody
        self.steps = self.steps + 1 if getattr(self, "last", None) == outlook.requests else 1
        self.last = outlook.requests
        if self.steps <= 3:
            return super().choose(outlook)
        return Choice(NO_DRAFT, gives_up=True)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_that_are_given_up_are_heard_of_no_more(kind, monkeypatch):
    target = target_of("llama")
    drafter = drafter_of(kind, "llama", False)
    heard = []
    commit = drafter.commit
    monkeypatch.setattr(drafter, "commit", lambda *args: (heard.append(1), commit(*args)))
    engine = Engine(target, target.new_cache(PAGES), Policy(), GivingUp(3), drafter, 1)
    long = SamplingParams(max_tokens=40, ignore_eos=True)
    plain = Engine(target, target.new_cache(PAGES), Policy(), FixedController(0))
    for prompt in PROMPTS[:2]:  # the second text begins anew
        heard.clear()
        (result,) = engine.generate([(prompt, long)])
        (expected,) = plain.generate([(prompt, long)])
        assert_same_tokens(target, prompt, expected.token_ids, result.token_ids, long, kind)
        assert len(heard) == 1 + 3 + 1  # the first token, its drafts, and the step that gave it up
        assert result.stats.draft_nodes > 0


def test_more_levels_than_heads_are_refused():
    with pytest.raises(ValueError, match="3 Medusa heads"):
        MedusaDrafter(medusa_heads(target_of("llama")), TreeShape.chain(4))
    with pytest.raises(ValueError, match="3 Medusa heads"):
        MedusaDrafter(medusa_heads(target_of("llama")), depth=4)
