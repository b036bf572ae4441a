"""Comparing two decodings of the same prompt: equal, or apart only at a tie within rounding."""

from __future__ import annotations

from typing import Any

import torch

from inferlab import _C
from inferlab.models import HFModel
from inferlab.types import SamplingParams


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    """The ``count`` new tokens of transformers' own greedy `generate`, ends of text ignored."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def scores_after(target: HFModel, tokens: list[int], params: SamplingParams) -> torch.Tensor:
    """What the choice after ``tokens`` is the arg-max of: logit / T + noise, in float64, [V]."""
    with target.plain() as model, torch.inference_mode():
        ids = torch.tensor([tokens], device=target.device)
        logits = model(ids, use_cache=False).logits[0, -1].double().cpu()
    if params.temperature == 0:
        return logits
    noise = torch.empty(logits.shape[0], dtype=torch.float32)
    _C.gumbel_row(params.seed, len(tokens), 0, noise)
    return logits / params.temperature + noise.double()


def assert_same_tokens(
    target: HFModel,
    prompt: list[int],
    expected: list[int],
    actual: list[int],
    params: SamplingParams,
    what: str,
) -> None:
    """Fails unless the tokens are equal or part where two scores are equal within rounding."""
    if actual == expected:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b),
        min(len(expected), len(actual)),
    )
    assert at < min(len(expected), len(actual)), f"{what}: lengths differ: {expected} {actual}"
    scores = scores_after(target, prompt + expected[:at], params)
    gap = abs(float(scores[expected[at]] - scores[actual[at]]))
    rounding = 64 * torch.finfo(target.dtype).eps * max(1.0, float(scores.abs().max()))
    assert gap <= rounding, (
        f"{what}: token {at} is {actual[at]}, not {expected[at]}; their scores differ by "
        f"{gap:.3g}, rounding explains {rounding:.3g}"
    )
