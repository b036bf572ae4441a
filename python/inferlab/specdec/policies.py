"""Acceptance policies: which draft tokens a step keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from inferlab import kernels
from inferlab.specdec.batch import Batch
from inferlab.specdec.tree import DraftTree
from inferlab.types import check

POLICIES = ("longest_prefix", "rejection", "conf_threshold", "topk_agree", "typical")


@dataclass(frozen=True)
class Policy:
    """A rule for walking a draft tree from its root.

    At a node the children are tried in order and the first accepted one is entered; when none is,
    the walk ends and the target's own choice there is emitted as the bonus token.

    ===============  ===================================================  =======================
    name             accepts child x of a node with target p, draft q     exact?
    ===============  ===================================================  =======================
    longest_prefix   x is the target's own choice at that position        same tokens, same seed
    rejection        u < p(x) / q(x), else p becomes the residual         same distribution
    conf_threshold   p(x) >= threshold                                    no
    topk_agree       x among the ``threshold`` largest p                  no
    typical          x in the locally typical set of mass ``threshold``   no
    ===============  ===================================================  =======================

    p is the target's distribution after penalties, bias and filters, as in plain decoding; q is
    the draft's after temperature and filters alone, and ``rejection`` needs drafts that were drawn
    so, without penalties, bias and ``min_tokens``' ban of end tokens.

    Args:
        name: one of the above.
        threshold: tau, k or p of the lossy policies.
    """

    name: str = "longest_prefix"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check("policy", self.name, self.name in POLICIES, f"one of {', '.join(POLICIES)}")
        if self.name == "conf_threshold":
            check("tau", self.threshold, 0 <= self.threshold <= 1, "in [0, 1]")
        elif self.name == "typical":
            check("p", self.threshold, 0 <= self.threshold <= 1, "in [0, 1]")
        elif self.name == "topk_agree":
            whole = self.threshold == int(self.threshold)
            check("k", self.threshold, whole and self.threshold >= 1, "an integer >= 1")

    @property
    def lossless(self) -> bool:
        """The output is distributed exactly as the target's own."""
        return self.name in ("longest_prefix", "rejection")

    @property
    def is_match(self) -> bool:
        """Whether a draft token is accepted where, and only where, it is the target's choice."""
        return self.name == "longest_prefix"

    @property
    def needs_draft_logits(self) -> bool:
        """Whether it compares p with q: ``DraftTree.draft_logits`` must be there."""
        return self.name == "rejection"

    def describe(self) -> dict[str, Any]:
        """For reports: name, losslessness and its own parameter."""
        info: dict[str, Any] = {"policy": self.name, "lossless": self.lossless}
        parameter = {"conf_threshold": "tau", "topk_agree": "k", "typical": "p"}.get(self.name)
        if parameter is not None:
            info[parameter] = int(self.threshold) if parameter == "k" else self.threshold
        return info

    def verify(self, logits: torch.Tensor, tree: DraftTree, batch: Batch) -> kernels.VerifyResult:
        """Walks the trees of a batch. ``logits``: [B, N, V] of the target.

        Padding of the vocabulary (``Batch.allowed_vocab``) is never chosen.
        """
        if self.is_match or tree.num_nodes == 1:
            # On a root alone every policy emits the target's own choice.
            return kernels.verify_tree_match(
                logits,
                tree.tokens,
                tree.links,
                batch.seq_lens,
                batch.sampling,
                allowed_vocab=batch.allowed_vocab,
            )
        if self.name == "rejection":
            return kernels.verify_tree_rejection(
                logits,
                tree.draft_logits,
                tree.tokens,
                tree.links,
                batch.seq_lens,
                batch.sampling,
                allowed_vocab=batch.allowed_vocab,
            )
        return kernels.verify_tree_lossy(
            logits,
            tree.tokens,
            tree.links,
            batch.seq_lens,
            batch.sampling,
            self.name,
            self.threshold,
            allowed_vocab=batch.allowed_vocab,
        )


def make_policy(name: str, *, tau: float = 0.5, k: int = 5, p: float = 0.9) -> Policy:
    """The policy ``name`` with its own parameter among ``tau``, ``k`` and ``p``."""
    thresholds = {"conf_threshold": tau, "topk_agree": float(k), "typical": p}
    return Policy(name, thresholds.get(name, 0.0))
