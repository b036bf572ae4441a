"""Every family x drafter x tree x temperature x batch: the tokens of plain decoding."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from exactness.compare import assert_same_tokens, generated
from helpers.tiny_models import FAMILIES, VOCAB, tiny_model
from inferlab.models import HFModel
from inferlab.scheduler import Request
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import ModelDrafter, NgramDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import TreeShape
from inferlab.types import SamplingParams

PAGES = 128
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
NEW_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(
    max_tokens=NEW_TOKENS, temperature=0.8, top_k=20, top_p=0.9, seed=7, ignore_eos=True
)
PROMPTS = [
    [5, 9, 33, 12, 5, 9, 33, 71, 5, 9],
    [101],
    [40, 41, 42, 40, 41, 42, 40, 41],
    [(7 * i * i + 3) % VOCAB for i in range(37)],
    [150, 3, 150, 3, 150],
]


needs_mps = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu]),
    pytest.param("mps", marks=[pytest.mark.mps, needs_mps]),
]


@cache
def target_of(family: str, device: str = "cpu") -> HFModel:
    return HFModel(tiny_model(family).to(device))


@cache
def draft_of(family: str, device: str = "cpu") -> HFModel:
    """The target with its weights disturbed: agrees often, but not always."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.08 * parameter.std() * noise if parameter.numel() > 1 else 0)
    return HFModel(model.to(device))


def engine(
    family: str,
    drafter: str = "none",
    tree: bool = False,
    max_batch: int = 8,
    device: str = "cpu",
) -> Engine:
    target = target_of(family, device)
    made = None
    if drafter == "vanilla":
        shape = TreeShape.regular((3, 2, 1)) if tree else TreeShape.chain(3)
        draft = draft_of(family, device)
        made = ModelDrafter(draft, draft.new_cache(PAGES), shape)
    elif drafter == "ngram":
        made = NgramDrafter(max_depth=4, branches=3 if tree else 1, max_match=2)
    return Engine(target, target.new_cache(PAGES), Policy(), FixedController(4), made, max_batch)


@cache
def plain_tokens(family: str, params: SamplingParams, device: str = "cpu") -> list[list[int]]:
    results = engine(family, device=device).generate([(p, params) for p in PROMPTS[:1]])
    alone = engine(family, max_batch=1, device=device)
    results += alone.generate([(p, params) for p in PROMPTS[1:]])
    return [r.token_ids for r in results]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", DEVICES)
def test_plain_decoding_is_generate(device, family):
    target = target_of(family, device)
    for prompt, tokens in zip(PROMPTS, plain_tokens(family, GREEDY, device), strict=True):
        with target.plain() as model:
            expected = generated(model, prompt, NEW_TOKENS)
        assert_same_tokens(target, prompt, expected, tokens, GREEDY, f"{family}, generate")


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("drafter", ["vanilla", "ngram"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", DEVICES)
def test_speculation_changes_no_token(device, family, drafter, tree, params):
    target = target_of(family, device)
    expected = plain_tokens(family, params, device)
    accepted = 0
    for batch in (1, 5):
        speculative = engine(family, drafter, tree, batch, device)
        results = speculative.generate([(p, params) for p in PROMPTS])
        for prompt, tokens, result in zip(PROMPTS, expected, results, strict=True):
            what = f"{family}, {drafter}, {'tree' if tree else 'chain'}, batch {batch}"
            assert_same_tokens(target, prompt, tokens, result.token_ids, params, what)
            accepted += result.stats.accepted
        assert speculative.scheduler.allocator.num_free == PAGES
    if drafter == "vanilla":
        assert accepted > 0, "the draft never agreed: nothing was tested"


def test_different_seeds_give_different_tokens():
    runs = engine("llama").generate(
        [(PROMPTS[0], SamplingParams(max_tokens=24, temperature=1.0, seed=s)) for s in range(4)]
    )
    assert len({tuple(r.token_ids) for r in runs}) == 4


@pytest.mark.parametrize("family", ["gpt2", "opt"])  # tables of positions, which end
def test_a_long_text_beside_one_that_has_just_come(family):
    texts = [[(5 * i) % 97 + 3 for i in range(100)], [(3 * i) % 89 + 3 for i in range(60)]]
    plain = engine(family, max_batch=1).generate([(text, GREEDY) for text in texts])
    speculative = engine(family, "vanilla")
    results = [speculative.add(Request(texts[0], GREEDY))]
    speculative.step()
    results.append(speculative.add(Request(texts[1], GREEDY)))
    while speculative.scheduler.running or speculative.scheduler.waiting:
        speculative.step()
    for text, expected, request in zip(texts, plain, results, strict=True):
        tokens = request.tokens[len(text) :]
        assert_same_tokens(target_of(family), text, expected.token_ids, tokens, GREEDY, family)
