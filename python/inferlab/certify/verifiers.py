"""What is certified: something that walks draft trees, as the kernels do, or as is handed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from inferlab import kernels
from inferlab.kernels import SamplingTensors, TreeLinks, VerifyResult
from inferlab.specdec.policies import Policy


@dataclass(frozen=True, eq=False)
class Walks:
    """What a verifier is given: B trees of N nodes over V tokens.

    Attributes:
        logits: f32[B, N, V] of the target.
        draft_logits: f32[B, N, V] that the children of each node were drawn from; None: they were
            not drawn, q is a point mass at each.
        tokens: i32[B, N] of the trees; ``links``: their structure.
        seq_lens: i32[B], the root's position.
        sampling: one entry per sequence; seeds are the noise.
        with_replacement: whether siblings were drawn independently of each other.
        allowed_vocab: columns from here on are padding; None: there is none.
    """

    logits: torch.Tensor
    draft_logits: torch.Tensor | None
    tokens: torch.Tensor
    links: TreeLinks
    seq_lens: torch.Tensor
    sampling: SamplingTensors
    with_replacement: bool = False
    allowed_vocab: int | None = None

    def to(self, device: torch.device | str) -> Walks:
        """The same walks on another device."""
        draft = self.draft_logits
        return replace(
            self,
            logits=self.logits.to(device),
            draft_logits=None if draft is None else draft.to(device),
            tokens=self.tokens.to(device),
            links=TreeLinks(*(part.to(device) for part in self.links)),
            seq_lens=self.seq_lens.to(device),
            sampling=self.sampling.to(device),
        )


Verifier = Callable[[Walks], VerifyResult]
"""Walks trees; a broken one can be handed to a certificate, which must find it."""


def kernel_verifier(policy: Policy, device: torch.device | str = "cpu") -> Verifier:
    """The kernel that the engine runs for a policy on a device; results come back to the CPU."""

    def verify(walks: Walks) -> VerifyResult:
        return VerifyResult(*(part.cpu() for part in run(walks.to(device))))

    def run(walks: Walks) -> VerifyResult:
        rest = (walks.tokens, walks.links, walks.seq_lens, walks.sampling)
        allowed = walks.allowed_vocab
        if policy.is_match:
            return kernels.verify_tree_match(walks.logits, *rest, allowed_vocab=allowed)
        if policy.needs_draft_logits:
            return kernels.verify_tree_rejection(
                walks.logits,
                walks.draft_logits,
                *rest,
                with_replacement=walks.with_replacement,
                allowed_vocab=allowed,
            )
        return kernels.verify_tree_lossy(
            walks.logits, *rest, policy.name, policy.threshold, allowed_vocab=allowed
        )

    return verify
