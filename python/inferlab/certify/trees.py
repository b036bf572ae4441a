"""Trees of a small vocabulary, drafted with the drafters' own noise: the first two tokens of each.

What enumeration cannot see: draws that depend on each other, of drafts, of acceptance and of what
comes instead. Drafted and verified with many seeds, the first two tokens must follow p(a) p(b | a),
whatever the tree; where a walk ends at its root, the second one is drawn as the next step would.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from inferlab.certify.cases import VLLM, logits_of
from inferlab.certify.outputs import Check, failed, passed, sampled_distance
from inferlab.certify.verifiers import Verifier, Walks
from inferlab.kernels import SamplingTensors, build_tree, sample
from inferlab.kernels.noise import PURPOSE_DRAFT, PURPOSE_TOKEN
from inferlab.specdec.policies import Policy

SAMPLES = 20_000
TREES = {
    "a chain": (-1, 0, 1),
    "two siblings": (-1, 0, 0),
    "two by two": (-1, 0, 0, 1, 1, 2, 2),
    "an uneven tree": (-1, 0, 0, 0, 1, 2, 2, 5),
}
_PREFIX = 7


def sampled_trees(
    policy: Policy, verifier: Verifier, level: float, samples: int = SAMPLES
) -> list[Check]:
    """A check for each tree over random tables of p and q, and one for vLLM's pair.

    Args:
        level: of each test: the chance that it fails by chance.
    """
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.ones(4), 5), rng.dirichlet(np.ones(4), 5)
    checks = [
        _check(f"first two tokens, {name}", p, q, parents, policy, verifier, level, samples)
        for name, parents in TREES.items()
    ]
    target, draft = (np.array([row] * (len(row) + 1)) for row in VLLM)
    name = "first token, target 10/60/30 %, draft 50/30/20 %"
    return [*checks, _check(name, target, draft, (-1, 0), policy, verifier, level, 2 * samples)]


def _check(
    name: str,
    p: np.ndarray,
    q: np.ndarray,
    parents: Sequence[int],
    policy: Policy,
    verifier: Verifier,
    level: float,
    samples: int,
) -> Check:
    """p, q: [V + 1, V]; row t is of the token behind t, the last one of that at the root."""
    size, nodes = p.shape[1], len(parents)
    sampling = SamplingTensors.of(samples, temperature=1.0, seed=list(range(samples)))
    p_table, q_table = (torch.stack([logits_of(row) for row in table]) for table in (p, q))
    purpose = PURPOSE_DRAFT if policy.needs_draft_logits else PURPOSE_TOKEN
    tokens = torch.zeros(samples, nodes, dtype=torch.int32)
    p_rows, q_rows = torch.zeros(samples, nodes, size), torch.zeros(samples, nodes, size)
    depth = [0] * nodes
    for node in range(nodes):
        depth[node] = 0 if node == 0 else depth[parents[node]] + 1
        behind = torch.full((samples,), size) if node == 0 else tokens[:, node].long()
        p_rows[:, node], q_rows[:, node] = p_table[behind], q_table[behind]
        children = [child for child in range(nodes) if parents[child] == node]
        if children:
            at = torch.full((samples,), _PREFIX + 1 + depth[node])
            tokens[:, children] = sample(
                q_rows[:, node], at, sampling, purpose=purpose, num_samples=len(children)
            )
    result = verifier(
        Walks(
            p_rows,
            q_rows if policy.needs_draft_logits else None,
            tokens,
            build_tree(torch.tensor([parents] * samples, dtype=torch.int32)),
            torch.full((samples,), _PREFIX, dtype=torch.int32),
            sampling,
        )
    )
    first = result.accepted_tokens[:, 0].long()
    if int(first.min()) < 0:
        return failed("trees", name, "a walk emitted no token")
    later = sample(p_table[first], torch.full((samples,), _PREFIX + 2), sampling)[:, 0]
    second = torch.where(result.num_accepted > 1, result.accepted_tokens[:, 1], later).long()
    if int(second.min()) < 0:
        return failed("trees", name, "a walk emitted no second token")
    counts = np.bincount((first * size + second).numpy(), minlength=size * size)
    target = (p[size][:, None] * p[:size]).ravel()
    by_first, marginal = counts.reshape(size, size).sum(1) / samples, p[size]
    if nodes == 2:  # of a tree that drafts one token, that one alone counts: fewer cells tell more
        counts, target = by_first * samples, marginal
    distance = sampled_distance(counts, target)
    text = f"{samples} samples, p = {distance['p_value']:.2g}"
    if policy.lossless and (distance["p_value"] or 0.0) < level:
        seen, wanted = (" / ".join(f"{100 * v:.1f}" for v in law) for law in (by_first, marginal))
        return failed("trees", name, f"{text}; first tokens {seen} % for {wanted} %", distance)
    return passed("trees", name, text, distance)
