"""Decoding on a device: the same tokens, and the host waits once a step."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.backends import Backend
from helpers.compare import assert_same_tokens
from helpers.decoding import (
    GREEDY,
    PAGES,
    PENALISED,
    PROMPTS,
    SAMPLED,
    Reads,
    draft_of,
    engine,
    needs_gpu,
    plain_tokens,
    target_of,
)
from helpers.pairwise import pairwise
from inferlab.models import fused
from inferlab.models.graphs import USES_BEFORE_CAPTURE
from inferlab.scheduler import Request
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import ModelDrafter, NgramDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import make_policy
from inferlab.specdec.tree import TreeShape


def make_engine(family: str, drafter: str, widths: tuple[int, ...], policy: str) -> Engine:
    target = target_of(family)
    made: Any = NgramDrafter(max_depth=4, branches=max(widths), max_match=2)
    if drafter == "vanilla":
        draft = draft_of(family)
        made = ModelDrafter(
            draft,
            draft.new_cache(PAGES),
            TreeShape.regular(widths),
            coupled=policy != "rejection",
            keep_logits=policy == "rejection",
        )
    rule = make_policy(policy)
    return Engine(target, target.new_cache(PAGES), rule, FixedController(4), made)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "top-p", "penalty"])
@pytest.mark.parametrize("widths", [(1, 1, 1), (3, 2, 1)], ids=["chain", "tree"])
@pytest.mark.parametrize("drafter", ["vanilla", "ngram"])
@pytest.mark.parametrize("policy", ["longest_prefix", "rejection", "typical"])
def test_the_host_reads_once_a_step(policy, drafter, widths, params):
    engine = make_engine("gpt2", drafter, widths, policy)
    for prompt in PROMPTS[:3]:
        engine.add(Request(prompt, params))
    steps = 0
    with Reads() as reads:
        while engine.scheduler.has_work and steps < 6:
            engine.step()
            steps += 1
    assert steps > 2
    assert reads.count == steps


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("drafter", ["vanilla", "ngram"])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_cuda_is_waited_for_once_a_step(drafter, tree):
    decoding = engine("gpt2", drafter, tree, device="cuda")
    for prompt in PROMPTS[:3]:
        decoding.add(Request(prompt, replace(SAMPLED, max_tokens=60)))
    for _ in range(USES_BEFORE_CAPTURE + 2):  # static trees are uploaded once, and a capture waits
        decoding.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                decoding.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(w.message) for w in caught) == 3


@pairwise(
    kernels=["cuda_shim", "metal_ops"],
    family=["gpt2", "llama", "gemma2"],
    drafter=["none", "vanilla", "ngram"],
    tree={"chain": False, "tree": True},
    params={"greedy": GREEDY, "top-p": SAMPLED, "penalty": PENALISED},
)
def test_an_accelerators_kernels_decode_the_cpus_tokens(
    request, monkeypatch, kernels, family, drafter, tree, params
):
    """The whole pipeline: the models in torch, everything between in csrc/cuda or csrc/metal."""
    ops = request.getfixturevalue(kernels)
    expected = plain_tokens(family, params)
    target = target_of(family, "cpu")
    # Off the CPU products are torch's, and a Metal device's models run through their own modules.
    monkeypatch.setattr(fused, "is_ours", lambda x: False)
    if kernels == "metal_ops":
        monkeypatch.setattr(target, "_fused", None)
        monkeypatch.setattr(draft_of(family, "cpu"), "_fused", None)
    decoding = engine(family, drafter, tree)
    with Backend(kernels, "cpu", ops).active():
        results = decoding.generate([(p, params) for p in PROMPTS])
    for prompt, tokens, result in zip(PROMPTS, expected, results, strict=True):
        what = f"{family}, {drafter}, {'tree' if tree else 'chain'}"
        assert_same_tokens(target, prompt, tokens, result.token_ids, params, what)
