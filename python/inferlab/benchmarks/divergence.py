"""Why two sides chose different tokens behind the same text: a tie within rounding, or a bug."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

TIE_STEPS = {torch.float32: 256, torch.bfloat16: 4, torch.float16: 4}
"""Two logits closer than this many rounding steps of their dtype can trade places.

A step is the distance of neighbouring numbers at the logit's size. Half types round each
activation, but the sums behind a logit in fp32: few steps; fp32 carries its rounding through all
layers: more, and still 1e-4 of a logit.
"""


def rounding_step(size: float, dtype: torch.dtype) -> float:
    """The distance of neighbouring numbers of ``dtype`` at ``size``."""
    size = max(size, torch.finfo(dtype).tiny)
    return math.ldexp(torch.finfo(dtype).eps, math.frexp(size)[1] - 1)


def judge_tie(scores: Sequence[float], largest_logit: float, dtype: torch.dtype) -> dict[str, Any]:
    """Whether rounding may have decided between two tokens.

    Args:
        scores: of the two tokens.
        largest_logit: the largest absolute logit of the row: it sets the size of rounding errors.
        dtype: of the model.

    Returns:
        ``scores``, their ``gap``, the ``rounding_step`` of the dtype at that size, and ``tie``.
    """
    step = rounding_step(largest_logit, dtype)
    gap = abs(scores[0] - scores[1])
    return {
        "scores": list(scores),
        "gap": gap,
        "rounding_step": step,
        "tie": gap <= TIE_STEPS[dtype] * step,
    }


@torch.inference_mode()
def row_behind(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """[V] logits of a Hugging Face model behind a text, read at once, in the model's dtype."""
    whole = torch.tensor([list(ids)], device=model.device)
    row: torch.Tensor = model(input_ids=whole, use_cache=False).logits[0, -1]
    return row


@torch.inference_mode()
def row_by_one(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """The same with the last token alone, behind the cached others, as plain decoding does it."""
    if len(ids) == 1:
        return row_behind(model, ids)
    whole = torch.tensor([list(ids)], device=model.device)
    cache = DynamicCache(config=model.config)
    # transformers renames the argument within its fifth major version.
    known = inspect.signature(model.forward).parameters
    held = {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}
    model(input_ids=whole[:, :-1], **held)
    at = torch.tensor([[len(ids) - 1]], device=model.device)
    row: torch.Tensor = model(input_ids=whole[:, -1:], position_ids=at, **held).logits[0, -1]
    return row
