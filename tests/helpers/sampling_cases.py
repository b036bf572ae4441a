"""Random trees, logits and sampling settings for the tests of sampling and verification."""

from __future__ import annotations

import numpy as np
import torch

from inferlab.kernels import SamplingTensors, TreeLinks, build_tree, sample

# Policies and thresholds for random walks.
LOSSY_RULES = [
    ("conf_threshold", 0.0),
    ("conf_threshold", 0.1013),
    ("conf_threshold", 0.613),
    ("topk_agree", 1),
    ("topk_agree", 30),
    ("topk_agree", 3000),
    ("typical", 0.2013),
    ("typical", 0.813),
]


def random_parents(rng: np.random.Generator, batch: int, nodes: int) -> torch.Tensor:
    """Trees of 1 to `nodes` nodes, padded with -2, bushy near the root and along the way."""
    parents = np.full((batch, nodes), -2, np.int32)
    for row in parents:
        row[0] = -1
        for n in range(1, int(rng.integers(1, nodes + 1))):
            row[n] = rng.integers(max(0, n - 4), n)
    return torch.from_numpy(parents)


def random_logits(
    rng: np.random.Generator, shape: tuple[int, ...], kind: str, dtype: torch.dtype
) -> torch.Tensor:
    """kind: normal, ties (integers), flat (all equal), masked (half -inf), broken (some rows)."""
    x = rng.standard_normal(shape).astype(np.float32) * float(rng.choice([0.3, 2.0, 6.0]))
    if kind == "ties":
        x = np.round(x)
    elif kind == "flat":
        x[:] = 1.5
    elif kind == "masked":
        x[rng.random(shape) < 0.5] = -np.inf
    elif kind == "broken":
        x[rng.random(shape[:-1]) < 0.2] = -np.inf
        x[rng.random(shape[:-1]) < 0.2, rng.integers(0, shape[-1])] = np.nan
        x[rng.random(shape[:-1]) < 0.1, rng.integers(0, shape[-1])] = np.inf
    return torch.from_numpy(x).to(dtype)


def random_sampling(rng: np.random.Generator, batch: int, vocab: int) -> SamplingTensors:
    """Any mix of filters, penalties and biases; top_p and min_p away from round sums, where the
    last bit of a sum would decide."""
    extra = {}
    if rng.random() < 0.4:
        extra = {
            "repetition_penalty": 1.3,
            "presence_penalty": 0.4,
            "frequency_penalty": ([0.2, 0.0, -0.3] * batch)[:batch],
            "prompt_tokens": rng.integers(0, vocab, (batch, 5)).tolist(),
            "output_tokens": rng.integers(0, vocab, (batch, 4)).tolist(),
        }
    if rng.random() < 0.3:
        extra["logit_bias"] = {
            int(rng.integers(0, vocab)): 3.0,
            int(rng.integers(0, vocab)): -float("inf"),
        }
    return SamplingTensors.of(
        batch,
        temperature=rng.choice([0.0, 0.5, 1.0, 1.7], batch).tolist(),
        top_k=rng.choice([0, 1, 3, 40, 600], batch).tolist(),
        top_p=rng.choice([1.0, 0.9137, 0.513, 0.0501], batch).tolist(),
        min_p=rng.choice([0.0, 0.0, 0.0313, 0.31], batch).tolist(),
        seed=rng.integers(-(2**63), 2**63 - 1, batch).tolist(),
        **extra,
    )


def likely_tokens(
    rng: np.random.Generator,
    logits: torch.Tensor,
    parents: torch.Tensor,
    links: TreeLinks,
    seq_lens: torch.Tensor,
    sampling: SamplingTensors,
) -> torch.Tensor:
    """Tree tokens of which many are what the target would choose, so that walks go deep."""
    batch, nodes, vocab = logits.shape
    positions = seq_lens.long().unsqueeze(1) + links.depth + 1
    chosen = sample(logits, positions, sampling)[..., 0]
    largest = logits.float().nan_to_num(nan=0.0).argmax(-1)
    tokens = torch.from_numpy(rng.integers(0, vocab, (batch, nodes)).astype(np.int32))
    for b in range(batch):
        for n in range(1, nodes):
            parent = int(parents[b, n])
            if parent >= 0 and rng.random() < 0.7:
                source = chosen if rng.random() < 0.5 else largest
                tokens[b, n] = max(int(source[b, parent]), 0)
    return tokens


def random_walk(
    rng: np.random.Generator, logits: torch.Tensor
) -> tuple[tuple[torch.Tensor, TreeLinks, torch.Tensor, SamplingTensors], int | None]:
    """A tree for logits [B, N, V]: (tokens, links, seq_lens, sampling), allowed_vocab."""
    batch, nodes, vocab = logits.shape
    parents = random_parents(rng, batch, nodes)
    links = build_tree(parents)
    sampling = random_sampling(rng, batch, vocab)
    seq_lens = torch.from_numpy(rng.integers(0, 100_000, batch).astype(np.int32))
    tokens = likely_tokens(rng, logits, parents, links, seq_lens, sampling)
    allowed = None if rng.random() < 0.7 else int(rng.integers(1, vocab + 1))
    return (tokens, links, seq_lens, sampling), allowed


def chain(nodes: int, batch: int = 1) -> TreeLinks:
    """The links of a chain."""
    return build_tree(torch.tensor([list(range(-1, nodes - 1))] * batch, dtype=torch.int32))
