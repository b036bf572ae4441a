"""The slow, obvious verification walks: one sequence, one node at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from inferlab.kernels.noise import PURPOSE_ACCEPT, PURPOSE_RECOVERY, PURPOSE_TOKEN
from inferlab.kernels.reference import noise
from inferlab.kernels.reference.sampling import (
    choose,
    filtered,
    is_greedy,
    penalised_logits,
    probabilities,
)
from inferlab.kernels.sampling_params import SamplingTensors

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Node(NamedTuple):
    """What a rule sees of the node that the walk stands on."""

    b: int
    node: int
    position: int  # absolute, of the token chosen here
    logits: torch.Tensor | None  # penalised float32 [V]; None: not to be sampled from
    children: list[int]
    child_tokens: list[int]


# Child entered (or -1) and the token emitted; the token is -1 at a row that cannot be sampled from.
Decision = tuple[int, int]


def _walk(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    links: Sequence[torch.Tensor],
    seq_lens: torch.Tensor,
    sampling: SamplingTensors,
    allowed_vocab: int | None,
    decide: Callable[[Node], Decision],
) -> Outputs:
    batch, size = tokens.shape
    nodes_out = torch.full((batch, size), -1, dtype=torch.int32)
    tokens_out = torch.full((batch, size), -1, dtype=torch.int32)
    count_out = torch.zeros(batch, dtype=torch.int32)
    first_child, next_sibling = links[1].tolist(), links[2].tolist()
    tree = tokens.tolist()
    for b in range(batch):
        node = 0
        path: list[int] = []
        for step in range(size):
            children = []
            child = first_child[b][node]
            while child >= 0:
                children.append(child)
                child = next_sibling[b][child]
            x = penalised_logits(logits[b, node], sampling, b, path, allowed_vocab)
            position = int(seq_lens[b]) + step + 1
            view = Node(b, node, position, x, children, [tree[b][c] for c in children])
            child, token = decide(view) if x is not None else (-1, -1)
            nodes_out[b, step], tokens_out[b, step] = node, token
            count_out[b] += 1
            if child < 0:
                break
            path.append(tree[b][child])
            node = child
    device = logits.device
    return nodes_out.to(device), tokens_out.to(device), count_out.to(device)


def _match(node: Node, sampling: SamplingTensors) -> Decision:
    """Enter the child that is the target's own choice."""
    token = choose(node.logits, sampling, node.b, node.position, PURPOSE_TOKEN, 1)[0]
    for child, candidate in zip(node.children, node.child_tokens, strict=True):
        if candidate == token:
            return child, token
    return -1, token


def verify_tree_match(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    links: Sequence[torch.Tensor],
    seq_lens: torch.Tensor,
    sampling: SamplingTensors,
    *,
    allowed_vocab: int | None = None,
) -> Outputs:
    """See inferlab.kernels.verify_tree_match."""
    return _walk(
        logits, tokens, links, seq_lens, sampling, allowed_vocab, lambda n: _match(n, sampling)
    )


def residual(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """norm(max(p - q, 0)); p itself where rounding leaves nothing of it."""
    r = (p - q).clamp(min=0)
    total = r.sum()
    return r / total if float(total) > 0 else p


def verify_tree_rejection(
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    links: Sequence[torch.Tensor],
    seq_lens: torch.Tensor,
    sampling: SamplingTensors,
    *,
    with_replacement: bool = False,
    allowed_vocab: int | None = None,
) -> Outputs:
    """See inferlab.kernels.verify_tree_rejection."""
    plain = sampling.without_penalties()

    def decide(node: Node) -> Decision:
        b = node.b
        if is_greedy(sampling, b):
            return _match(node, sampling)
        x, seed, temperature = node.logits, int(sampling.seed[b]), float(sampling.temperature[b])
        if x is None:
            return -1, -1
        p = probabilities(x, filtered(x, sampling, b), temperature)
        q = None
        children = list(zip(node.children, node.child_tokens, strict=True))
        if children and draft_logits is not None:
            y = penalised_logits(draft_logits[b, node.node], plain, b, (), allowed_vocab)
            if y is None:  # nothing sensible was drawn from it: the target alone decides
                children = []
            else:
                q = probabilities(y, filtered(y, plain, b), temperature)
        tried: set[int] = set()
        for child, token in children:
            if not with_replacement and token in tried:
                continue
            tried.add(token)
            proposal = q
            if proposal is None:  # a deterministic drafter proposes with certainty
                proposal = torch.zeros_like(p)
                proposal[token] = 1
            u = noise.uniform(seed, node.position, child, PURPOSE_ACCEPT)
            if float(p[token]) > 0 and u * float(proposal[token]) < float(p[token]):
                return child, token
            p = residual(p, proposal)
            if q is not None and not with_replacement:
                q = q.clone()
                q[token] = 0
                if float(q.sum()) > 0:
                    q = q / q.sum()
        g = noise.gumbel_row(seed, node.position, x.numel(), PURPOSE_RECOVERY, x.device)
        return -1, int(torch.argmax(torch.log(p).float() + g))

    return _walk(logits, tokens, links, seq_lens, sampling, allowed_vocab, decide)


def locally_typical(p: torch.Tensor, mass: float) -> torch.Tensor:
    """bool[V]: the tokens whose information is nearest to the entropy, until `mass` is reached
    (Meister et al., "Locally typical sampling", 2022); ties by lower id."""
    information = -torch.log(p)
    entropy = torch.where(p > 0, p * information, 0).sum()
    deviation = torch.where(p > 0, (information - entropy).abs(), torch.inf)
    order = torch.argsort(deviation, stable=True)
    mass_before = torch.cumsum(p[order], 0) - p[order]
    typical = torch.zeros_like(p, dtype=torch.bool)
    typical[order] = (mass_before < mass) & (p[order] > 0)
    return typical


def verify_tree_lossy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    links: Sequence[torch.Tensor],
    seq_lens: torch.Tensor,
    sampling: SamplingTensors,
    policy: str,
    threshold: float,
    *,
    allowed_vocab: int | None = None,
) -> Outputs:
    """See inferlab.kernels.verify_tree_lossy."""

    def decide(node: Node) -> Decision:
        x = node.logits
        if x is None:
            return -1, -1
        if node.children:
            greedy = is_greedy(sampling, node.b)
            keep = x > -torch.inf if greedy else filtered(x, sampling, node.b)
            p = probabilities(x, keep, 1.0 if greedy else float(sampling.temperature[node.b]))
            if policy == "conf_threshold":
                accepted = p >= threshold
            elif policy == "topk_agree":
                accepted = torch.zeros_like(keep)
                accepted[torch.argsort(x, descending=True, stable=True)[: int(threshold)]] = True
            else:
                assert policy == "typical"
                accepted = locally_typical(p, threshold)
            accepted &= p > 0
            for child, token in zip(node.children, node.child_tokens, strict=True):
                if accepted[token]:
                    return child, token
        return -1, choose(x, sampling, node.b, node.position, PURPOSE_TOKEN, 1)[0]

    return _walk(logits, tokens, links, seq_lens, sampling, allowed_vocab, decide)
