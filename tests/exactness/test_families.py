"""Every family x drafter x tree x temperature x batch: the tokens of plain decoding."""

from __future__ import annotations

import pytest
import torch

from helpers.compare import assert_same_tokens, generated
from helpers.decoding import (
    GREEDY,
    NEW_TOKENS,
    PAGES,
    PROMPTS,
    SAMPLED,
    engine,
    needs_gpu,
    plain_tokens,
    target_of,
)
from helpers.pairwise import pairwise
from helpers.tiny_models import FAMILIES
from inferlab.scheduler import Request
from inferlab.types import SamplingParams

needs_mps = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu]),
    pytest.param("mps", marks=[pytest.mark.mps, needs_mps]),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", DEVICES)
def test_plain_decoding_is_generate(device, family):
    target = target_of(family, device)
    for prompt, tokens in zip(PROMPTS, plain_tokens(family, GREEDY, device), strict=True):
        with target.plain() as model:
            expected = generated(model, prompt, NEW_TOKENS)
        assert_same_tokens(target, prompt, expected, tokens, GREEDY, f"{family}, generate")


@pairwise(
    family=FAMILIES,
    drafter=["vanilla", "ngram"],
    tree={"chain": False, "tree": True},
    params={"greedy": GREEDY, "sampled": SAMPLED},
)
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
