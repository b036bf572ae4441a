"""The slow, obvious sampler: penalties, filters and the Gumbel-max draw, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from inferlab.kernels.reference import noise
from inferlab.kernels.sampling_params import GREEDY_TEMPERATURE, SamplingTensors


def is_greedy(sampling: SamplingTensors, b: int) -> bool:
    return float(sampling.temperature[b]) < GREEDY_TEMPERATURE


def penalised_logits(
    row: torch.Tensor,
    sampling: SamplingTensors,
    b: int,
    path: Sequence[int] = (),
    allowed_vocab: int | None = None,
) -> torch.Tensor | None:
    """float32 logits of sequence b after penalties and bias; forbidden columns are -inf.

    `path`: tokens on the way to this row behind the end of the context. None if the row cannot be
    sampled from: a NaN, +inf, or nothing but -inf among the allowed columns.
    """
    x = row.float().clone()
    vocab = x.numel() if allowed_vocab is None else min(allowed_vocab, x.numel())
    if sampling.uses_context:
        assert sampling.context_tokens is not None
        assert sampling.context_lens is not None
        assert sampling.prompt_lens is not None
        length = int(sampling.context_lens[b])
        context = sampling.context_tokens[b, :length].tolist() + list(path)
        output = context[int(sampling.prompt_lens[b]) :]
        if sampling.repetition_penalty is not None:
            r = sampling.repetition_penalty[b]
            for t in set(context):
                x[t] = x[t] / r if x[t] > 0 else x[t] * r
        for t in set(output):
            if sampling.frequency_penalty is not None:
                x[t] = x[t] - sampling.frequency_penalty[b] * float(output.count(t))
            if sampling.presence_penalty is not None:
                x[t] = x[t] - sampling.presence_penalty[b]
    if sampling.bias_tokens is not None and sampling.bias_values is not None:
        for t, value in zip(sampling.bias_tokens[b].tolist(), sampling.bias_values[b], strict=True):
            if t >= 0:
                x[t] = x[t] + value
    x[vocab:] = -torch.inf
    if bool(torch.isnan(x).any()) or not bool(torch.isfinite(x.max())):
        return None
    return x


def kept(
    x: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """Which tokens survive top-k, top-p and min-p: bool[V]. `x`: penalised float32 logits."""
    order = torch.argsort(x, descending=True, stable=True)
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    weight = torch.exp((x[order].to(exact) - x.max().to(exact)) / temperature)
    weight[x[order] == -torch.inf] = 0
    keep = x[order] > -torch.inf
    if 0 < top_k < x.numel():
        keep[top_k:] = False
        weight[top_k:] = 0
    if top_p < 1:
        mass_before = torch.cumsum(weight, 0) - weight
        keep &= mass_before < top_p * weight.sum()
        keep[0] = True
    keep &= weight >= min_p  # weight is p / p_max
    out = torch.zeros_like(keep)
    out[order] = keep
    return out


def filtered(x: torch.Tensor, sampling: SamplingTensors, b: int) -> torch.Tensor:
    """bool[V]: `kept` with the parameters of sequence b."""
    return kept(
        x,
        float(sampling.temperature[b]),
        int(sampling.top_k[b]),
        float(sampling.top_p[b]),
        float(sampling.min_p[b]),
    )


def probabilities(x: torch.Tensor, keep: torch.Tensor, temperature: float) -> torch.Tensor:
    """The distribution that is sampled from: float64[V] (float32 on MPS)."""
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    z = (x.to(exact) - x.max().to(exact)) / temperature
    return torch.softmax(torch.where(keep, z, -torch.inf), 0)


def choose(
    x: torch.Tensor | None, sampling: SamplingTensors, b: int, position: int, purpose: int, n: int
) -> list[int]:
    """The n best tokens by filtered_logit / temperature + gumbel, best first; then -1."""
    return [token for token, _ in best(x, sampling, b, position, purpose, n)]


def best(
    x: torch.Tensor | None, sampling: SamplingTensors, b: int, position: int, purpose: int, n: int
) -> list[tuple[int, float]]:
    """`choose`, with the score of each token; -inf where there is none."""
    if x is None:
        return [(-1, -math.inf)] * n
    if is_greedy(sampling, b):
        score = x
    else:
        g = noise.gumbel_row(int(sampling.seed[b]), position, x.numel(), purpose, x.device)
        keep = filtered(x, sampling, b)
        score = torch.where(keep, x / sampling.temperature[b] + g, -torch.inf)
    order = torch.argsort(score, descending=True, stable=True)[:n]
    found = [(int(t), float(score[t])) for t in order if score[t] > -torch.inf]
    return found + [(-1, -math.inf)] * (n - len(found))


def sample(
    logits: torch.Tensor,
    positions: torch.Tensor,
    sampling: SamplingTensors,
    *,
    purpose: int = 0,
    num_samples: int = 1,
    allowed_vocab: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See inferlab.kernels.sample: tokens and scores."""
    rows = logits.unsqueeze(1) if logits.dim() == 2 else logits
    at = positions.unsqueeze(1) if positions.dim() == 1 else positions
    out = [
        [
            best(
                penalised_logits(rows[b, n], sampling, b, (), allowed_vocab),
                sampling,
                b,
                int(at[b, n]),
                purpose,
                num_samples,
            )
            for n in range(rows.shape[1])
        ]
        for b in range(rows.shape[0])
    ]
    shape = (*logits.shape[:-1], num_samples)
    pairs = torch.tensor(out, dtype=torch.float64).reshape(*shape, 2).to(logits.device)
    return pairs[..., 0].to(torch.int32), pairs[..., 1].to(torch.float32)
