"""Decoding with the tiny models: prompts, engines with a drafter, and the tokens without one."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from helpers.tiny_models import VOCAB, tiny_model
from inferlab.models import HFModel
from inferlab.specdec.control import Choice
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import ModelDrafter, NgramDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import NO_DRAFT, TreeShape
from inferlab.types import SamplingParams

PAGES = 128
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
NEW_TOKENS = 24
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(
    max_tokens=NEW_TOKENS, temperature=0.8, top_k=20, top_p=0.9, seed=7, ignore_eos=True
)
PENALISED = SamplingParams(
    max_tokens=24, temperature=0.9, repetition_penalty=1.3, frequency_penalty=0.2, seed=3
)
PROMPTS = [
    [5, 9, 33, 12, 5, 9, 33, 71, 5, 9],
    [101],
    [40, 41, 42, 40, 41, 42, 40, 41],
    [(7 * i * i + 3) % VOCAB for i in range(37)],
    [150, 3, 150, 3, 150],
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
    return engine_of(target_of(family, device), drafter, tree, max_batch, family, device)


def engine_of(
    target: HFModel,
    drafter: str,
    tree: bool,
    max_batch: int,
    draft_family: str = "llama",
    device: str = "cpu",
) -> Engine:
    """An engine of any target; ``draft_family``: of the draft model, where there is one."""
    made = None
    if drafter == "vanilla":
        shape = TreeShape.regular((3, 2, 1)) if tree else TreeShape.chain(3)
        draft = draft_of(draft_family, device)
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


def trees_of(drafter: Any) -> list[list[Any]]:
    """All that a drafter proposes from here on, as lists: depths, tokens, links and logits."""
    propose, seen = drafter.propose, []

    def kept(*args: Any) -> Any:
        drafted = propose(*args)
        tensors = (drafted.tokens, *drafted.links, drafted.draft_logits)
        seen.append([drafted.depths, *(t.tolist() for t in tensors if t is not None)])
        return drafted

    drafter.propose = kept
    return seen


class Sleepy(FixedController):
    """Drafts in some steps only, so that the drafter has to catch up."""

    def __init__(self, k):
        super().__init__(k)
        self.step = 0

    def choose(self, outlook):
        self.step += 1
        return super().choose(outlook) if self.step % 4 in (0, 1) else Choice(NO_DRAFT)


WAITS = {
    getattr(torch.Tensor, name)
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__")
}


class Reads(TorchFunctionMode):
    """Counts what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in WAITS
        return func(*args, **(kwargs or {}))
