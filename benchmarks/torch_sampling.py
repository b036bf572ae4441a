"""What a careful PyTorch user writes for the same job: the yardstick of the benchmarks.

Batched, no Python loop over tokens, torch's own random numbers, one sort for top-k and top-p as in
common samplers. Not bit-equal to the kernels (those are held against inferlab.kernels.reference).
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


def verify_match(
    logits: torch.Tensor,
    tokens: list[list[int]],
    children: list[list[list[int]]],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[list[int]]:
    """Walks each tree, sampling only the rows it visits."""
    out = []
    for b, row in enumerate(tokens):
        node, emitted = 0, []
        while node >= 0:
            token = int(sample(logits[b, node : node + 1], temperature, top_k, top_p)[0])
            emitted.append(token)
            node = next((c for c in children[b][node] if row[c] == token), -1)
        out.append(emitted)
    return out


def verify_rejection(
    logits: torch.Tensor,
    draft_logits: torch.Tensor,
    tokens: list[list[int]],
    children: list[list[list[int]]],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[list[int]]:
    """Multi-round speculative sampling without replacement, on the rows it visits."""
    out = []
    for b, row in enumerate(tokens):
        node, emitted = 0, []
        while node >= 0:
            p = probabilities(logits[b, node : node + 1], temperature, top_k, top_p)[0]
            following = -1
            if children[b][node]:
                q = probabilities(draft_logits[b, node : node + 1], temperature, top_k, top_p)[0]
            for child in children[b][node]:
                token = row[child]
                if torch.rand(()) * q[token] < p[token]:
                    following = child
                    break
                p = torch.clamp(p - q, min=0)
                p = p / p.sum()
                q[token] = 0
                q = q / q.sum()
            if following < 0:
                token = int(torch.argmax(p / torch.empty_like(p).exponential_()))
            emitted.append(token)
            node = following
        out.append(emitted)
    return out


def verify_lossy(
    logits: torch.Tensor,
    tokens: list[list[int]],
    children: list[list[list[int]]],
    policy: str,
    threshold: float,
    temperature: float,
) -> list[list[int]]:
    """The three lossy rules, on the rows it visits."""
    out = []
    for b, row in enumerate(tokens):
        node, emitted = 0, []
        while node >= 0:
            p = probabilities(logits[b, node : node + 1], temperature)[0]
            good = torch.zeros(len(p), dtype=torch.bool)
            if policy == "conf_threshold":
                good = p >= threshold
            elif policy == "topk_agree":
                good[torch.topk(p, int(threshold)).indices] = True
            else:
                information = -torch.log(p)
                deviation = (information - torch.nansum(p * information)).abs()
                order = torch.sort(deviation).indices
                good[order] = torch.cumsum(p[order], 0) - p[order] < threshold
            node = next((c for c in children[b][node] if good[row[c]]), -1)
            if node < 0:
                emitted.append(int(torch.argmax(p / torch.empty_like(p).exponential_())))
            else:
                emitted.append(row[node])
        out.append(emitted)
    return out
