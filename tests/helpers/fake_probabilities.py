"""The distribution of a fake model's next token, worked out in double precision."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch

from inferlab.models import FakeLM, ForwardBatch, last_rows
from inferlab.types import SamplingParams


def next_logits(model: FakeLM, tokens: list[int]) -> np.ndarray:
    """The model's logits after ``tokens``, [V]."""
    cache = model.new_cache(4)
    ids = torch.tensor([tokens])
    logits = model.forward(
        ForwardBatch(
            tokens=ids,
            positions=torch.arange(len(tokens))[None],
            seq_lens=torch.zeros(1, dtype=torch.int32),
            block_table=torch.arange(4, dtype=torch.int32)[None],
            scored=last_rows(ids),
        ),
        cache,
    ).logits
    return logits[0, 0].double().numpy()


def next_probabilities(
    model: FakeLM, prompt: list[int], params: SamplingParams, output: tuple[int, ...] = ()
) -> np.ndarray:
    """The distribution of the token after ``prompt`` and ``output``, [V].

    Of the filters it knows temperature, top-k and, of what that leaves, top-p.
    """
    logits = next_logits(model, [*prompt, *output])
    for token in {*prompt, *output}:
        scale = params.repetition_penalty
        logits[token] = logits[token] / scale if logits[token] > 0 else logits[token] * scale
    for token, count in Counter(output).items():
        logits[token] -= params.frequency_penalty * count + params.presence_penalty
    for token, value in (params.logit_bias or {}).items():
        logits[token] += value
    if len(output) < params.min_tokens:
        logits[list(params.stop_token_ids)] = -math.inf
    if params.top_k:
        logits[np.argsort(-logits, kind="stable")[params.top_k :]] = -math.inf
    weights = np.exp((logits - logits.max()) / params.temperature)
    weights /= weights.sum()
    likeliest = np.argsort(-weights, kind="stable")
    before = np.cumsum(weights[likeliest]) - weights[likeliest]
    weights[likeliest[before >= params.top_p]] = 0
    return weights / weights.sum()
