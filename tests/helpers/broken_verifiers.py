"""Speculative sampling in a few lines of torch, right and with the mistakes that others shipped.

`verifier(mistake)` walks trees as the kernels do, from the same noise; "" makes none. Certificates
must pass that one, and name what is wrong with each of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from inferlab.certify.verifiers import Verifier, Walks, kernel_verifier
from inferlab.kernels import VerifyResult
from inferlab.kernels.noise import PURPOSE_ACCEPT, PURPOSE_DRAFT, PURPOSE_RECOVERY
from inferlab.kernels.reference import noise
from inferlab.kernels.reference.sampling import kept, probabilities
from inferlab.specdec.batch import Batch
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import DraftTree

GRID = 2.0**-10  # of coarse uniforms, so that they are 0 or 1 often enough to be seen


def verifier(mistake: str = "") -> Verifier:
    """The `rejection` rule."""

    def verify(walks: Walks) -> VerifyResult:
        batch, size = walks.tokens.shape
        seeds = walks.sampling.seed
        at = torch.arange(batch)
        nodes = torch.full((batch, size), -1, dtype=torch.int32)
        tokens = torch.full((batch, size), -1, dtype=torch.int32)
        count = torch.zeros(batch, dtype=torch.int32)
        node = torch.zeros(batch, dtype=torch.int64)
        walking = torch.ones(batch, dtype=torch.bool)
        for step in range(size):
            if not walking.any():
                break
            position = walks.seq_lens.long() + step + 1
            p = _laws(walks.logits[at, node], walks, mistake)
            q = None
            if walks.draft_logits is not None:
                q = _laws(walks.draft_logits[at, node], walks, "")
            target, entered = p.clone(), torch.zeros(batch, dtype=torch.int64)
            tried = torch.zeros(p.shape, dtype=torch.bool)
            child = walks.links.first_child[at, node].long()
            while (child >= 0).any():
                there = walking & (child >= 0) & (entered == 0) & ~target.isnan().any(1)
                slot = child.clamp(min=0)
                token = walks.tokens[at, slot].long()
                fresh = ~tried[at, token]
                if not walks.with_replacement and mistake != "duplicates counted twice":
                    there &= fresh
                proposal = q
                if proposal is None:
                    proposal = torch.nn.functional.one_hot(token, p.shape[1]).double()
                u = _uniform(seeds, position, slot, mistake)
                judged = p if mistake == "residual not updated" else target
                chance, drawn = judged[at, token], proposal[at, token]
                takes = (u * drawn < chance) & (chance > 0)
                if mistake == "p = 0 accepted at u = 0":
                    takes = u * drawn <= chance
                if mistake == "rejected at u = 1":
                    takes &= u < 1
                if mistake == "always accepted":
                    takes = chance > 0
                if _greedy(walks):
                    takes = chance == 1
                accepted = there & takes
                entered = torch.where(accepted, slot, entered)
                refused = there & ~takes
                tried[at[refused], token[refused]] = True
                base = p if mistake == "residual not updated" else target
                left = _residual(base, proposal, mistake)
                target = torch.where(refused[:, None], left, target)
                if q is not None and not walks.with_replacement and mistake != "draft not updated":
                    without = q.clone()
                    without[at, token] = 0
                    total = without.sum(1, keepdim=True)
                    without = torch.where(total > 0, without / total, q)
                    q = torch.where(refused[:, None], without, q)
                child = torch.where(child >= 0, walks.links.next_sibling[at, slot].long(), child)
            chosen = walks.tokens[at, entered].long()
            last = p if mistake == "recovery from the target" else target
            drawn_token = _draw(last, seeds, position, mistake)
            chosen = torch.where(entered > 0, chosen, drawn_token)
            nodes[:, step] = torch.where(walking, node, -1).int()
            tokens[:, step] = torch.where(walking, chosen, -1).int()
            count += walking.int()
            walking = walking & (entered > 0)
            node = torch.where(walking, entered, node)
        return VerifyResult(nodes, tokens, count)

    return verify


def _greedy(walks: Walks) -> bool:
    return float(walks.sampling.temperature[0]) == 0


def _laws(rows: torch.Tensor, walks: Walks, mistake: str) -> torch.Tensor:
    """f64[B, V]; NaN where a row cannot be sampled from."""
    different, which = rows.unique(dim=0, return_inverse=True)
    if rows.isnan().any():  # unique takes each NaN for itself
        different, which = rows, torch.arange(len(rows))
    allowed = rows.shape[1] if walks.allowed_vocab is None else walks.allowed_vocab
    if mistake == "padding chosen":
        allowed = rows.shape[1]
    cache: dict[bytes, torch.Tensor] = {}
    laws = []
    for row in different:
        key = row.numpy().tobytes()
        if key not in cache:
            cache[key] = _law(row.clone(), allowed, walks, mistake)
        laws.append(cache[key])
    return torch.stack(laws)[which]


def _law(x: torch.Tensor, allowed: int, walks: Walks, mistake: str) -> torch.Tensor:
    sampling = walks.sampling
    x[allowed:] = -torch.inf
    if mistake == "broken rows chosen from":
        x = x.nan_to_num(nan=0.0, neginf=-1e30)
    if x.isnan().any() or not x.max().isfinite():
        return torch.full(x.shape, torch.nan, dtype=torch.float64)
    if _greedy(walks):
        if mistake == "divided by temperature 0":
            x = (x / 0.0).nan_to_num(nan=-torch.inf, posinf=3e38)
        best = torch.argmax(x)
        if mistake == "last of equal logits":
            best = x.numel() - 1 - torch.argmax(x.flip(0))
        return torch.nn.functional.one_hot(best, x.numel()).double()
    settings = [float(getattr(sampling, name)[0]) for name in ("temperature", "top_p", "min_p")]
    top_k = int(sampling.top_k[0])
    keep = kept(x, settings[0], top_k, settings[1], settings[2])
    if mistake == "top-k keeps ties" and top_k:
        keep = x >= x.sort(descending=True).values[min(top_k, len(x)) - 1]
    return probabilities(x, keep, settings[0])


def _uniform(
    seeds: torch.Tensor, position: torch.Tensor, child: torch.Tensor, mistake: str
) -> torch.Tensor:
    words = noise.noise_words(seeds, position, child, PURPOSE_ACCEPT)
    u = ((words >> 9).double() + 0.5) * 2.0**-23
    if mistake == "p = 0 accepted at u = 0":
        return torch.floor(u / GRID) * GRID
    if mistake == "rejected at u = 1":
        return torch.ceil(u / GRID) * GRID
    return u


def _residual(p: torch.Tensor, q: torch.Tensor, mistake: str) -> torch.Tensor:
    left = (p - q).clamp(min=0)
    total = left.sum(1, keepdim=True)
    if mistake == "rejected at u = 1":
        return left / total.clamp(min=1e-30)  # nothing, where p = q
    return torch.where(total > 0, left / total, p)


def _draw(
    law: torch.Tensor, seeds: torch.Tensor, position: torch.Tensor, mistake: str
) -> torch.Tensor:
    purpose = PURPOSE_DRAFT if mistake == "noise shared with the draft" else PURPOSE_RECOVERY
    ids = torch.arange(law.shape[1])
    words = noise.noise_words(seeds[:, None], position[:, None], ids, purpose)
    score = torch.log(law).float() + noise.gumbel_from_words(words)
    return torch.where(law.isnan().any(1), -1, score.nan_to_num(nan=-torch.inf).argmax(1))


def match(mistake: str) -> Verifier:
    """The `longest_prefix` rule by its kernel, or with the first child taken, whatever it is."""

    def verify(walks: Walks) -> VerifyResult:
        result = kernel_verifier(Policy("longest_prefix"))(walks)
        if mistake == "first child always taken":
            drafted = (walks.links.first_child[:, 0] > 0).nonzero()[:, 0]
            first = walks.links.first_child[drafted, 0].long()
            other = walks.tokens[drafted, first] != result.accepted_tokens[drafted, 0]
            drafted, first = drafted[other], first[other]
            token = walks.tokens[drafted, first]
            result.accepted_tokens[drafted, 0] = token
            if len(drafted):
                result.accepted_tokens[drafted, 1] = token  # whatever comes behind it
                result.accepted_nodes[drafted, 1] = first.int()
                result.num_accepted[drafted] = 2
        return result

    return verify


@dataclass(frozen=True)
class BrokenPolicy(Policy):
    """A policy that runs a verifier of this file in the engine."""

    verifier: Callable[[Walks], VerifyResult] | None = None

    def verify(self, logits: torch.Tensor, tree: DraftTree, batch: Batch) -> VerifyResult:
        assert self.verifier is not None
        draft = tree.draft_logits
        return self.verifier(
            Walks(
                logits.float(),
                None if draft is None else draft.float(),
                tree.tokens,
                tree.links,
                batch.seq_lens,
                batch.sampling,
                allowed_vocab=batch.allowed_vocab,
            )
        )
