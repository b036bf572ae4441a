"""What a careful PyTorch user writes for sampling and verification: a yardstick of the benchmarks.

Batched, no Python loop over tokens or sequences, torch's own random numbers, one sort for top-k and
top-p as in common samplers; walks read only the rows that they visit. Nothing waits for the device,
so a CUDA graph can hold it; on the CPU, where asking costs nothing, a walk stops when all its
sequences have. Not bit-equal to the kernels (those are held against inferlab.kernels.reference).
"""

from __future__ import annotations

import torch


def probabilities(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Filtered distribution of each row, [R, V] float32."""
    z = logits.float() / temperature
    if top_k > 0 and top_p >= 1:
        least = torch.topk(z, top_k).values[:, -1:]
        z = z.masked_fill(z < least, -torch.inf)
    elif top_p < 1:
        if top_k > 0:
            values, order = torch.topk(z, top_k)
        else:
            values, order = torch.sort(z, descending=True)
        p = torch.softmax(values, -1)
        drop = torch.cumsum(p, -1) - p >= top_p
        z = torch.full_like(z, -torch.inf).scatter(1, order, values.masked_fill(drop, -torch.inf))
    return torch.softmax(z, -1)


def sample(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, count: int = 1
) -> torch.Tensor:
    """One or several tokens per row by the exponential race (Gumbel-max without the logarithms)."""
    if temperature == 0:
        return torch.topk(logits, count).indices if count > 1 else torch.argmax(logits, -1)
    p = probabilities(logits, temperature, top_k, top_p)
    race = p / torch.empty_like(p).exponential_()
    return torch.topk(race, count).indices if count > 1 else torch.argmax(race, -1)


class Walk:
    """A level at a time, all sequences together: where each is, and what it has emitted.

    Args:
        tokens: [B, N] i32; children: [N, C] i64 of the tree that all sequences share, -1 pads.
        levels: nodes on the longest path.
    """

    def __init__(self, tokens: torch.Tensor, children: torch.Tensor, levels: int) -> None:
        self.tokens, self.children, self.levels = tokens, children, levels
        self.batch = torch.arange(len(tokens), device=tokens.device)
        self.node = torch.zeros_like(self.batch)
        self.alive = torch.ones_like(self.batch, dtype=torch.bool)
        self.emitted: list[torch.Tensor] = []

    def __iter__(self) -> Walk:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The present nodes' children [B, C], -1 pads, and their tokens."""
        ended = self.alive.is_cpu and not self.alive.any()
        if ended or len(self.emitted) == self.levels:
            raise StopIteration
        below = self.children[self.node]
        return below, self.tokens.gather(1, below.clamp(min=0))

    def rows(self, logits: torch.Tensor) -> torch.Tensor:
        return logits[self.batch, self.node]

    def step(self, entered: torch.Tensor, token: torch.Tensor) -> None:
        """Emits `token` and goes to `entered` (-1: ends), [B] each."""
        self.emitted.append(torch.where(self.alive, token, -1))
        self.alive = self.alive & (entered >= 0)
        self.node = torch.where(self.alive, entered, self.node)

    def result(self) -> torch.Tensor:
        """Emitted tokens [B, levels walked], -1 behind each sequence's end."""
        return torch.stack(self.emitted, 1)


def first(candidates: torch.Tensor, good: torch.Tensor) -> torch.Tensor:
    """The first good candidate of each row, or -1; both [B, C]."""
    index = good.int().argmax(1, keepdim=True)
    return torch.where(good.any(1), candidates.gather(1, index)[:, 0], -1)


def race(p: torch.Tensor) -> torch.Tensor:
    return torch.argmax(p / torch.empty_like(p).exponential_(), -1)


def verify_match(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    children: torch.Tensor,
    levels: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> torch.Tensor:
    """Enters the child that holds the token sampled from the row."""
    walk = Walk(tokens, children, levels)
    for below, below_tokens in walk:
        token = sample(walk.rows(logits), temperature, top_k, top_p)
        walk.step(first(below, (below >= 0) & (below_tokens == token[:, None])), token)
    return walk.result()


def verify_rejection(
    logits: torch.Tensor,
    draft_logits: torch.Tensor,
    tokens: torch.Tensor,
    children: torch.Tensor,
    levels: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> torch.Tensor:
    """Multi-round speculative sampling without replacement."""
    walk = Walk(tokens, children, levels)
    for below, below_tokens in walk:
        p = probabilities(walk.rows(logits), temperature, top_k, top_p)
        q = probabilities(walk.rows(draft_logits), temperature, top_k, top_p)
        entered = torch.full_like(walk.node, -1)
        for child, token in zip(below.unbind(1), below_tokens.long().unbind(1), strict=True):
            tried = walk.alive & (child >= 0) & (entered < 0)
            if tried.is_cpu and not tried.any():
                break
            at = token[:, None]
            u = torch.rand_like(p[:, 0])
            accepted = tried & (u * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0])
            entered = torch.where(accepted, child, entered)
            rejected = (tried & ~accepted)[:, None]
            residual = torch.clamp(p - q, min=0)
            p = torch.where(rejected, residual / residual.sum(1, keepdim=True), p)
            left = q.scatter(1, at, 0)
            q = torch.where(rejected, left / left.sum(1, keepdim=True), q)
        chosen = tokens.gather(1, entered.clamp(min=0)[:, None])[:, 0]
        walk.step(entered, torch.where(entered >= 0, chosen.long(), race(p)))
    return walk.result()


def verify_lossy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    children: torch.Tensor,
    levels: int,
    policy: str,
    threshold: float,
    temperature: float,
) -> torch.Tensor:
    """The three lossy rules."""
    walk = Walk(tokens, children, levels)
    for below, below_tokens in walk:
        p = probabilities(walk.rows(logits), temperature)
        if policy == "conf_threshold":
            good = p >= threshold
        elif policy == "topk_agree":
            best = torch.topk(p, int(threshold)).indices
            good = torch.zeros_like(p, dtype=torch.bool).scatter(1, best, True)
        else:
            information = -torch.log(p)
            entropy = torch.nansum(p * information, 1, keepdim=True)
            order = torch.sort((information - entropy).abs()).indices
            sorted_p = p.gather(1, order)
            within = torch.cumsum(sorted_p, 1) - sorted_p < threshold
            good = torch.zeros_like(within).scatter(1, order, within)
        entered = first(below, (below >= 0) & good.gather(1, below_tokens.long()))
        chosen = tokens.gather(1, entered.clamp(min=0)[:, None])[:, 0]
        walk.step(entered, torch.where(entered >= 0, chosen.long(), race(p)))
    return walk.result()
