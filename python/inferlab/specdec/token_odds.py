"""How probable a model finds the tokens of a tree, each at its parent."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from inferlab.kernels import SamplingTensors
from inferlab.kernels.sampling_params import GREEDY_TEMPERATURE
from inferlab.specdec.tree import DraftTree

CHUNK = 2**24
"""Logits looked at together."""


def token_odds(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    sampling: SamplingTensors,
    allowed_vocab: int | None = None,
    each: SamplingTensors | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probability and place of each token among all, at its parent.

    The distribution is that of `kernels.verify_tree_lossy`: after penalties, bias and filters; at
    temperature 0 the softmax of the penalised logits, untruncated. Tokens rank by logit, ties by
    lower id.

    Args:
        logits: [B, N, V] at each node.
        tokens: [B, N] int.
        parents: [B, N] int64; of a root any node: what is said of it means nothing.
        sampling: one entry per sequence.
        allowed_vocab: columns from here on are padding.
        each: of `at_each_node`: penalties then count the path to a node, too.

    Returns:
        f32 [B, N] and int64 [B, N].
    """
    size, count, vocab = logits.shape
    odds = torch.empty((size, count), dtype=torch.float32, device=logits.device)
    places = torch.empty((size, count), dtype=torch.int64, device=logits.device)
    step = max(1, CHUNK // (count * vocab))
    for first in range(0, size, step):
        part = slice(first, min(first + step, size))
        if each is None:
            x = _penalised(logits[part], sampling, part, allowed_vocab)
        else:
            alone = slice(part.start * count, part.stop * count)
            x = _penalised(logits[part].reshape(-1, 1, vocab), each, alone, allowed_vocab)
            x = x.view(-1, count, vocab)
        odds[part], places[part] = _odds(
            x,
            tokens[part].to(torch.int64),
            parents[part].to(torch.int64),
            sampling,
            part,
        )
    return odds, places


def at_each_node(sampling: SamplingTensors, tree: DraftTree) -> SamplingTensors:
    """Sampling parameters of B * N sequences, each of which ends at a node: its context has the
    tokens of the path to it. Of padding it means nothing."""
    assert sampling.context_tokens is not None
    assert sampling.context_lens is not None
    size, count = tree.tokens.shape
    depth = tree.links.depth.clamp_min(0)
    nodes = torch.arange(count, device=tree.tokens.device)
    on_path = ((tree.links.ancestors[:, :, nodes // 64] >> (nodes % 64)) & 1) > 0
    on_path = on_path & (depth > 0)[:, None]  # the root is in the context
    sequence, node, above = on_path.nonzero(as_tuple=True)
    contexts = sampling.context_tokens[:, None].repeat(1, count, 1)
    room = int(depth.max()) + int(sampling.context_lens.max()) - contexts.shape[2]
    contexts = torch.nn.functional.pad(contexts, (0, max(room, 0)))
    places = (sampling.context_lens[sequence] + depth[sequence, above] - 1).to(torch.int64)
    contexts[sequence, node, places] = tree.tokens[sequence, above].to(contexts.dtype)
    fields = {
        field.name: getattr(sampling, field.name)
        for field in dataclasses.fields(sampling)
        if field.init
    }
    repeated: dict[str, Any] = {
        name: value if value is None else value.repeat_interleave(count, dim=0)
        for name, value in fields.items()
    }
    repeated["context_tokens"] = contexts.view(size * count, -1)
    repeated["context_lens"] = (sampling.context_lens[:, None] + depth).view(-1)
    return SamplingTensors(**repeated)


def _odds(
    x: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    sampling: SamplingTensors,
    part: slice,
) -> tuple[torch.Tensor, torch.Tensor]:
    heat = sampling.temperature[part]
    greedy = heat < GREEDY_TEMPERATURE
    heat = torch.where(greedy, torch.ones_like(heat), heat)[:, None, None]
    rows = x.gather(1, parents[..., None].expand(-1, -1, x.shape[-1]))
    inside = (tokens >= 0) & (tokens < x.shape[-1])
    ids = torch.where(inside, tokens, 0)[..., None]
    own = rows.gather(2, ids)
    lower = torch.arange(x.shape[-1], device=x.device) < ids
    places = ((rows > own) | ((rows == own) & lower)).sum(2)
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    most = x.amax(2, keepdim=True).to(exact)
    weights = ((x.to(exact) - most) / heat).exp()
    totals = weights.sum(2)
    kept = torch.full_like(totals, x.shape[-1], dtype=torch.int64)
    filters = (sampling.top_k[part] > 0) | (sampling.top_p[part] < 1) | (sampling.min_p[part] > 0)
    if bool((filters & ~greedy).any()):
        filtered, filtered_totals = _filtered(weights, sampling, part)
        kept = torch.where(greedy[:, None], kept, filtered)
        totals = torch.where(greedy[:, None], totals, filtered_totals)
    chance = ((own[..., 0].to(exact) - most[..., 0].gather(1, parents)) / heat[..., 0]).exp()
    chance = chance / totals.gather(1, parents)
    alive = inside & (places < kept.gather(1, parents))
    return torch.where(alive, chance, 0.0).to(torch.float32), places


def _filtered(
    weights: torch.Tensor, sampling: SamplingTensors, part: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tokens survive top-k, top-p and min-p, the likeliest, and the sum of their weights,
    [B, N] both. ``weights``: p / p_max."""
    weights = weights.sort(dim=2, descending=True, stable=True).values
    vocab = weights.shape[2]
    place = torch.arange(vocab, device=weights.device)
    top_k = sampling.top_k[part].to(torch.int64)
    top_k = torch.where(top_k > 0, top_k, vocab)[:, None, None]
    weights = weights * (place < top_k)
    top_p = sampling.top_p[part].to(weights.dtype)[:, None, None]
    before = weights.cumsum(2) - weights
    mass = weights.sum(2, keepdim=True)
    keep = (place < top_k) & ((before < top_p * mass) | (top_p >= 1) | (place == 0))
    keep &= weights >= sampling.min_p[part].to(weights.dtype)[:, None, None]
    return keep.sum(2), (weights * keep).sum(2)


def _penalised(
    logits: torch.Tensor, sampling: SamplingTensors, part: slice, allowed_vocab: int | None
) -> torch.Tensor:
    """float32 [B, N, V] after penalties and bias; padding is -inf."""
    x = logits.float()
    if x is logits:
        x = x.clone()
    vocab = x.shape[-1]
    if sampling.uses_context:
        assert sampling.context_tokens is not None
        assert sampling.context_lens is not None
        assert sampling.prompt_lens is not None
        context = sampling.context_tokens[part].to(torch.int64).clamp(0, vocab - 1)
        at = torch.arange(context.shape[1], device=x.device)
        real = at < sampling.context_lens[part][:, None]
        new = real & (at >= sampling.prompt_lens[part][:, None])
        counts = x.new_zeros((2, len(x), vocab))
        counts[0].scatter_add_(1, context, real.to(x.dtype))
        counts[1].scatter_add_(1, context, new.to(x.dtype))
        there, repeated = counts[0][:, None], counts[1][:, None]
        if sampling.repetition_penalty is not None:
            r = sampling.repetition_penalty[part][:, None, None]
            x = torch.where(there > 0, torch.where(x > 0, x / r, x * r), x)
        if sampling.frequency_penalty is not None:
            x = x - sampling.frequency_penalty[part][:, None, None] * repeated
        if sampling.presence_penalty is not None:
            x = x - sampling.presence_penalty[part][:, None, None] * (repeated > 0)
    if sampling.bias_tokens is not None and sampling.bias_values is not None:
        ids = sampling.bias_tokens[part].to(torch.int64)
        bias = x.new_zeros((len(x), vocab))
        values = torch.where(ids >= 0, sampling.bias_values[part], 0.0)
        bias.scatter_add_(1, ids.clamp_min(0), values)
        x = x + bias[:, None]
    if allowed_vocab is not None:
        x[..., max(allowed_vocab, 0) :] = -torch.inf
    return x
