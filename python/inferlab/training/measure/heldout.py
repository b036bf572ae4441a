"""How many tokens a target forward yields on held-out text, from one pass over the text.

An accepted token is the target's own choice, so the target's text does not depend on the draft:
it is written once, and what a draft that begins behind any of its tokens would say is read off
it. Counted is at which rank of the draft's scores the target's token stands, position by position.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inferlab.training.material.features import read_features

Path = tuple[int, ...]
# From a text and a number of positions to the draft's logits `[drafts, positions, V]`; row r is
# a draft that begins behind token `text.start + r`, its column i about the (i + 1)-th token after.
Guess = Callable[["Text", int], Tensor]


@dataclass(frozen=True)
class Text:
    """What the target wrote behind one prompt.

    Attributes:
        tokens: int64 `[1, T + 1]`, prompt included.
        features: bf16 or fp32 `[1, T, F]`.
        start: index of the first token written; a draft may begin behind it.
        noise: fp32 `[T + 1 - start, V]`, added to the logits of the token it stands for, target's
            and draft's alike (Gumbel noise times the temperature); 0 at temperature 0.
    """

    tokens: Tensor
    features: Tensor
    start: int
    noise: Tensor


@torch.no_grad()
def write_texts(
    target: Any,
    prompts: list[np.ndarray],
    layers: tuple[int, ...],
    *,
    new_tokens: int,
    temperature: float,
    seed: int = 0,
) -> list[Text]:
    """Lets the target continue the prompts, with noise that is shared with the drafts."""
    texts = []
    vocab_size = target.get_output_embeddings().weight.shape[0]
    for index, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        noise = torch.zeros(1, vocab_size).expand(new_tokens, -1)
        if temperature:
            noise = torch.empty(new_tokens, vocab_size).exponential_(generator=generator)
            noise = -temperature * noise.log()
        ids = torch.from_numpy(prompt.astype(np.int64))[None].to(target.device)
        text, step, cache = ids, ids, None
        for row in noise:
            output = target(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            step = (output.logits[0, -1].float() + row.to(ids.device)).argmax().view(1, 1)
            text = torch.cat([text, step], dim=1)
        features = read_features(target, text, layers).to(target.device)
        texts.append(Text(text, features, prompt.size, noise))
    return texts


@torch.no_grad()
def ranks(guess: Guess, text: Text, positions: int) -> Tensor:
    """Where the target's tokens stand in the draft's scores: int64 `[drafts, positions]`.

    Row r is a draft that begins behind token `text.start + r`; 0 is the draft's first choice, -1
    is behind the end of the text.
    """
    tokens = text.tokens[0]
    count = tokens.numel() - text.start - 1
    logits = guess(text, positions)
    found = torch.full((count, positions), -1)
    for index in range(positions):
        rows = count - index
        if rows <= 0:
            break
        scores = logits[:rows, index].float() + text.noise[1 + index :].to(logits.device)
        chosen = scores.gather(1, tokens[text.start + 1 + index :, None])
        found[:rows, index] = (scores > chosen).sum(-1).cpu()
    return found


def grow_tree(found: Tensor, nodes: int, max_rank: int = 16) -> frozenset[Path]:
    """The static tree of the `nodes` paths of ranks that were right most often.

    Medusa's way (Cai et al., 2024): a path's worth is the product of its ranks' frequencies at
    their positions, and paths are taken best first; a parent is always better than its children.

    Args:
        found: of `ranks`, from all texts, `[drafts, positions]`.
        nodes: without the root.
    """
    share = torch.stack([(found == rank).float().mean(0) for rank in range(max_rank)], dim=1)
    tree: set[Path] = set()
    queue: list[tuple[float, Path]] = [(-float(p), (r,)) for r, p in enumerate(share[0])]
    heapq.heapify(queue)
    while queue and len(tree) < nodes:
        worth, path = heapq.heappop(queue)
        if not worth:
            break
        tree.add(path)
        if len(path) < share.shape[0]:
            for rank, p in enumerate(share[len(path)]):
                heapq.heappush(queue, (worth * float(p), (*path, rank)))
    return frozenset(tree)


def chain(length: int) -> frozenset[Path]:
    """The draft's first choices, one behind the other."""
    return frozenset((0,) * depth for depth in range(1, length + 1))


def accepted_lengths(found: Tensor, tree: frozenset[Path]) -> list[int]:
    """Tokens that each target forward yields on one text, the bonus token included.

    Args:
        found: of `ranks`.
        tree: paths of ranks that are proposed.
    """
    rows = found.tolist()
    position, lengths = 0, []
    while position < len(rows):
        accepted = 0
        while tuple(rows[position][: accepted + 1]) in tree and accepted < len(rows[position]):
            accepted += 1
        lengths.append(accepted + 1)
        position += accepted + 1
    return lengths


@dataclass(frozen=True)
class Measured:
    """Acceptance on a set of texts.

    Attributes:
        by_position: share of first choices that are right, given that those before were.
        chain: mean tokens per target forward with chains of `len(by_position)`.
        tree: the same with a static tree of `nodes` nodes grown on these texts.
    """

    by_position: tuple[float, ...]
    chain: float
    tree: float
    nodes: int


def measure(guess: Guess, texts: list[Text], *, positions: int, nodes: int) -> Measured:
    """Acceptance of chains and of a static tree."""
    found = [ranks(guess, text, positions) for text in texts]
    every = torch.cat(found)
    right = every == 0
    alive = torch.ones(every.shape[0], dtype=torch.bool)
    by_position = []
    for index in range(positions):
        alive = alive & (every[:, index] >= 0)
        by_position.append(float(right[alive, index].float().mean()) if alive.any() else 0.0)
        alive = alive & right[:, index]

    def mean(tree: frozenset[Path]) -> float:
        lengths = [length for one in found for length in accepted_lengths(one, tree)]
        return sum(one.shape[0] for one in found) / len(lengths)

    return Measured(
        tuple(by_position), mean(chain(positions)), mean(grow_tree(every, nodes)), nodes
    )
