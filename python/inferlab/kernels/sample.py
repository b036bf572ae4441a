"""sample: filtered Gumbel-max draws, one or several without replacement, per row of logits."""

from __future__ import annotations

from typing import Any

import torch

from inferlab.kernels import reference
from inferlab.kernels._registry import (
    as_tensor,
    empty,
    is_compiling,
    is_numpy,
    new_workspace,
    ops_for,
    register,
)
from inferlab.kernels.sampling_params import SamplingTensors

# The fields of SamplingTensors, in order, as they stand in the ops' schemas.
SAMPLING_SCHEMA = (
    "Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed, "
    "Tensor? repetition_penalty, Tensor? presence_penalty, Tensor? frequency_penalty, "
    "Tensor? context_tokens, Tensor? context_lens, Tensor? prompt_lens, "
    "Tensor? bias_tokens, Tensor? bias_values"
)
NUM_SAMPLING_FIELDS = SAMPLING_SCHEMA.count(",") + 1


def _run(
    logits: torch.Tensor,
    positions: torch.Tensor,
    sampling: SamplingTensors,
    purpose: int,
    num_samples: int,
    allowed_vocab: int | None,
    out: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> torch.Tensor:
    ops = ops_for(logits)
    if ops is None:
        tokens, values = reference.sample(
            logits,
            positions,
            sampling,
            purpose=purpose,
            num_samples=num_samples,
            allowed_vocab=allowed_vocab,
        )
        if scores is not None:
            scores.copy_(values)
        return tokens if out is None else out.copy_(tokens)
    if out is None:
        out = empty((*logits.shape[:-1], max(num_samples, 1)), logits, torch.int32)
    if workspace is None:
        workspace = sample_workspace(logits, sampling, num_samples, scores is not None)
    allowed = -1 if allowed_vocab is None else max(allowed_vocab, 0)
    ops.sample(
        logits, positions, sampling.flat, purpose, num_samples, allowed, out, scores, workspace
    )
    return out


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
    ops = ops_for(logits)
    if ops is None:
        return None
    size = ops.sample_workspace_bytes(
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
            by (at temperature 0 their logits); -inf where there is no token. Not under
            torch.compile.

    Returns:
        i32[B, n] or [B, N, n]; -1 where fewer than n tokens survive the filters, and everywhere in
        a row that cannot be sampled from (a NaN, +inf, or nothing but -inf).

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    if is_compiling() and scores is None:
        return torch.ops.inferlab.sample(
            logits, positions, *sampling.flat, purpose, num_samples, allowed_vocab
        )
    if is_numpy(logits):
        out = _run(
            as_tensor(logits), as_tensor(positions), sampling, purpose, num_samples, allowed_vocab
        )
        return out.numpy()  # type: ignore[return-value]
    return _run(
        logits, positions, sampling, purpose, num_samples, allowed_vocab, out, workspace, scores
    )


def _impl(logits: torch.Tensor, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
    sampling = SamplingTensors(*rest[:NUM_SAMPLING_FIELDS])
    return _run(logits, positions, sampling, *rest[NUM_SAMPLING_FIELDS:])


def _fake(logits: torch.Tensor, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
    num_samples = rest[NUM_SAMPLING_FIELDS + 1]
    return logits.new_empty((*logits.shape[:-1], num_samples), dtype=torch.int32)


register(
    f"sample(Tensor logits, Tensor positions, {SAMPLING_SCHEMA}, int purpose, int num_samples, "
    "int? allowed_vocab) -> Tensor",
    _impl,
    _fake,
)
