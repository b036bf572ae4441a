"""sample: filtered Gumbel-max draws, one or several without replacement, per row of logits."""

from __future__ import annotations

import torch

from inferlab.kernels._registry import empty, new_workspace, ops_for, run
from inferlab.kernels.sampling_params import SamplingTensors


def sample_workspace(
    logits: torch.Tensor,
    sampling: SamplingTensors,
    num_samples: int = 1,
    with_scores: bool = False,
) -> torch.Tensor | None:
    """Scratch memory that serves `sample` for these shapes; None where it needs none.

    Its contents do not matter, before and after. To be given where the call may not allocate, or
    is made again and again.
    """
    size = ops_for(logits).sample_workspace_bytes(
        logits, sampling.changes_logits, num_samples > 1 or with_scores
    )
    return new_workspace(size, logits)


def sample(
    logits: torch.Tensor,
    positions: torch.Tensor,
    sampling: SamplingTensors,
    *,
    purpose: int = 0,
    num_samples: int = 1,
    allowed_vocab: int | None = None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draws the best `num_samples` tokens of each row by filtered_logit / temperature + Gumbel.

    The noise belongs to (seed, position, token, purpose) alone, so a row's draw does not depend on
    its batch. Several samples are without replacement, in descending order of the perturbed score
    (Kool et al., "Stochastic beams and where to find them", 2019). At temperature 0: the largest
    logits, ties by lower id.

    Args:
        logits: f32, bf16 or f16 [B, V] or [B, N, V], contiguous in the last dimension.
        positions: i64[B] or [B, N], absolute position of the token to be chosen.
        sampling: one entry per sequence; penalties count its context (no tree path).
        purpose: 0 the target's choice (drafters share it on purpose), 1 draft draws under
            `rejection`, 2 acceptance, 3 recovery.
        num_samples: n >= 1.
        allowed_vocab: columns from here on are padding and never chosen.
        out: where the result goes.
        workspace: of `sample_workspace`.
        scores: f32, of the result's shape, or None: where the scores go that the tokens were chosen
            by (at temperature 0 their logits); -inf where there is no token.

    Returns:
        i32[B, n] or [B, N, n]; -1 where fewer than n tokens survive the filters, and everywhere in
        a row that cannot be sampled from (a NaN, +inf, or nothing but -inf).

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    if out is None:
        out = empty((*logits.shape[:-1], max(num_samples, 1)), logits, torch.int32)
    run(
        logits,
        "sample",
        logits,
        positions,
        *sampling.flat,
        purpose,
        num_samples,
        allowed_columns(allowed_vocab),
        out,
        scores,
        workspace,
    )
    return out


def allowed_columns(allowed_vocab: int | None) -> int:
    """As the kernels take it: -1 for all columns."""
    return -1 if allowed_vocab is None else max(allowed_vocab, 0)
