"""Every drafter without a model of its own, and ensembles: the tokens of plain decoding."""

from __future__ import annotations

from functools import cache, partial

import pytest

from helpers.compare import assert_same_tokens
from helpers.decoding import Reads, draft_of, target_of
from helpers.pairwise import pairwise
from helpers.tiny_models import VOCAB
from inferlab import _C
from inferlab.models import FakeLM, TargetModel
from inferlab.scheduler import Request
from inferlab.specdec.controllers import make_controller
from inferlab.specdec.drafters import (
    Drafter,
    EnsembleDrafter,
    ModelDrafter,
    NgramDrafter,
    RecyclingDrafter,
    ensemble,
)
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import TreeShape
from inferlab.types import SamplingParams

PAGES = 256
PARAMS = {
    "greedy": SamplingParams(max_tokens=32, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=32, temperature=0.8, seed=7, ignore_eos=True),
}
CONTROLLERS = {
    "fixed": lambda: make_controller("fixed", k=4),
    "adaptive": lambda: make_controller("adaptive", min_k=0, max_k=4),
    "cost": lambda: make_controller("cost", max_k=4),
}
FAMILIES = ("llama", "gemma2")
TARGETS = ("fake", *FAMILIES)


@cache
def model(name: str) -> TargetModel:
    return FakeLM(vocab_size=VOCAB, seed=3) if name == "fake" else target_of(name)


@cache
def draft(name: str) -> TargetModel:
    return FakeLM(vocab_size=VOCAB, seed=3, agreement=0.7) if name == "fake" else draft_of(name)


@cache
def prompts(name: str) -> list[list[int]]:
    return [
        [5, 9, 33, 12, 5, 9, 33, 71, 5, 9],
        [101],
        [40, 41, 42, 40, 41, 42, 40, 41],
        [(7 * i * i + 3) % VOCAB for i in range(37)],
        [150, 3, 150, 3, 150],
    ]


def vanilla(name: str, shape: TreeShape) -> ModelDrafter:
    return ModelDrafter(draft(name), draft(name).new_cache(PAGES), shape)


def corpus(name: str) -> object:
    """What the target writes after other prompts, some of it wrong."""
    made = _C.SuffixAutomaton()
    for prompt, tokens in zip(prompts(name), plain_tokens(name, "greedy"), strict=True):
        made.extend(prompt + tokens[:9] + [7] + tokens[9:])
    made.freeze()
    return made


def make(drafter: str, name: str, tree: bool) -> Drafter | None:
    device = model(name).device
    shape = TreeShape.regular((3, 2, 1)) if tree else TreeShape.chain(3)
    if drafter == "ngram":
        return NgramDrafter(4, 3 if tree else 1, 1, None)
    if drafter == "ngram+corpus":
        return NgramDrafter(4, 3 if tree else 1, 1, 4, corpus(name))
    if drafter == "recycling":
        return RecyclingDrafter(model(name).vocab_size, device, shape)
    if drafter == "vanilla+ngram":
        members = [vanilla(name, shape), NgramDrafter(5, 2 if tree else 1, 1, None)]
        return EnsembleDrafter(members, max_nodes=12)
    if drafter == "vanilla+vanilla+recycling":
        recycling = RecyclingDrafter(model(name).vocab_size, device)
        return EnsembleDrafter(
            [vanilla(name, shape), vanilla(name, TreeShape.chain(2)), recycling], max_nodes=24
        )
    return None


DRAFTERS = ("ngram", "ngram+corpus", "recycling", "vanilla+ngram", "vanilla+vanilla+recycling")


def engine(drafter: str, name: str, tree: bool, controller: str, max_batch: int) -> Engine:
    made = make(drafter, name, tree)
    cache = model(name).new_cache(PAGES)
    return Engine(model(name), cache, Policy(), CONTROLLERS[controller](), made, max_batch)


@cache
def plain_tokens(name: str, params: str) -> list[list[int]]:
    plain = engine("none", name, False, "fixed", 1)
    return [r.token_ids for r in plain.generate([(p, PARAMS[params]) for p in prompts(name)])]


@pairwise(
    # Where a draft must have agreed.
    always=lambda name, drafter, tree, params, controller: (
        (tree, params, controller) == (True, "greedy", "fixed")
        and drafter not in ("ngram", "recycling")
    ),
    name=TARGETS,
    drafter=DRAFTERS,
    tree={"chain": False, "tree": True},
    params=list(PARAMS),
    controller=list(CONTROLLERS),
)
def test_speculation_changes_no_token(name, drafter, tree, params, controller):
    expected = plain_tokens(name, params)
    accepted = 0
    for batch in (1, 4):
        decoding = engine(drafter, name, tree, controller, batch)
        results = decoding.generate([(p, PARAMS[params]) for p in prompts(name)])
        for prompt, tokens, result in zip(prompts(name), expected, results, strict=True):
            what = f"{name}, {drafter}, {'tree' if tree else 'chain'}, {controller}, batch {batch}"
            if name == "fake":
                assert result.token_ids == tokens, what
            else:
                assert_same_tokens(
                    model(name), prompt, tokens, result.token_ids, PARAMS[params], what
                )
            accepted += result.stats.accepted
        assert decoding.scheduler.allocator.num_free == PAGES
    copies = drafter == "ngram+corpus" and params == "greedy"
    if controller == "fixed" and (copies or "vanilla" in drafter):
        assert accepted > 0, "the draft never agreed: nothing was tested"


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("name", TARGETS)
def test_the_draft_models_cache_in_an_ensemble_is_that_of_a_draft_model_alone(name, tree):
    """What the draft proposes tells whether the K/V of its committed tokens is right."""
    shape = TreeShape.regular((2, 2, 1)) if tree else TreeShape.chain(3)
    proposals = []
    for others in ([], [NgramDrafter(5, 3, 1, None)]):
        drafter = vanilla(name, shape)
        propose, seen = drafter.propose, {}

        def watch(batch, budget, judge=None, propose=propose, seen=seen):
            made = propose(batch, budget)
            if made.num_nodes == shape.num_nodes:
                for sequence, tokens in zip(batch.requests, made.tokens.tolist(), strict=True):
                    seen[sequence.request_id, len(sequence.tokens)] = tokens
            return made

        drafter.propose = watch
        room = 2 * shape.num_nodes - 1
        made = EnsembleDrafter([drafter, *others], max_nodes=room) if others else drafter
        decoding = Engine(
            model(name), model(name).new_cache(PAGES), Policy(), make_controller("fixed"), made, 4
        )
        decoding.generate([(p, PARAMS["greedy"]) for p in prompts(name)])
        proposals.append(seen)
    alone, together = proposals
    common = alone.keys() & together.keys()
    assert len(common) > 20
    # Rounding may turn a tie among random weights.
    differing = [key for key in common if alone[key] != together[key]]
    assert len(differing) <= (0 if name == "fake" else 1), differing


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("drafter", ["vanilla+ngram", "vanilla+vanilla+recycling"])
@pytest.mark.parametrize("name", ["fake", "llama"])
def test_trees_merged_as_on_an_accelerator_change_no_token(
    monkeypatch, name, drafter, tree, params
):
    monkeypatch.setattr(ensemble, "merge", partial(ensemble.merge, on_host=False))
    decoding = engine(drafter, name, tree, "fixed", 4)
    results = decoding.generate([(p, PARAMS[params]) for p in prompts(name)])
    for prompt, tokens, result in zip(
        prompts(name), plain_tokens(name, params), results, strict=True
    ):
        if name == "fake":
            assert result.token_ids == tokens
        else:
            assert_same_tokens(
                model(name), prompt, tokens, result.token_ids, PARAMS[params], drafter
            )
    assert sum(r.stats.accepted for r in results) > 0


@pytest.mark.parametrize("drafter", ["recycling", "vanilla+vanilla+recycling"])
@pytest.mark.parametrize("params", PARAMS)
def test_rejection_decodes_to_the_end(drafter, params):
    policy = Policy("rejection")
    target = model("llama")
    made = make(drafter, "llama", True)
    decoding = Engine(target, target.new_cache(PAGES), policy, make_controller("fixed"), made, 4)
    results = decoding.generate([(p, PARAMS[params]) for p in prompts("llama")])
    assert [len(r.token_ids) for r in results] == [32] * 5
    if params == "greedy":
        for prompt, tokens, result in zip(
            prompts("llama"), plain_tokens("llama", params), results, strict=True
        ):
            assert_same_tokens(target, prompt, tokens, result.token_ids, PARAMS[params], drafter)


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("drafter", ["ngram+corpus", "recycling"])
def test_the_host_reads_once_a_step(drafter, tree):
    decoding = engine(drafter, "llama", tree, "fixed", 4)
    for prompt in prompts("llama")[:3]:
        decoding.add(Request(prompt, PARAMS["greedy"]))
    decoding.step()
    decoding.step()
    with Reads() as reads:
        for _ in range(4):
            decoding.step()
    assert reads.count == 4
