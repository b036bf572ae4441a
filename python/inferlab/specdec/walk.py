"""What a step kept of its draft trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from inferlab.models import ForwardOutput
from inferlab.specdec.tree import DraftTree


class Outcome(NamedTuple):
    """A request's part of a step, on the host.

    Attributes:
        accepted: draft tokens accepted.
        nodes: the nodes visited, the root first.
        tokens: the tokens kept, the bonus token last.
    """

    accepted: int
    nodes: list[int]
    tokens: list[int]

    def would_accept(self, parent: int, token: int) -> bool | None:
        """Whether a walk that matches tokens had gone on to another child of a node: None where
        it ended before the choice behind that."""
        if self.nodes[-1] != parent:
            return False  # it did not come by, or went on to a sibling
        return self.tokens[-1] == token if len(self.tokens) == len(self.nodes) else None


def came_true(tree: DraftTree, outcomes: Sequence[Outcome]) -> list[bool | None]:
    """Of each sequence, whether the node that was left out of its tree would have been accepted;
    None: not known, or there is none."""
    if not tree.left_out:
        return []
    return [
        None if parent < 0 else outcome.would_accept(parent, token)
        for (parent, token), outcome in zip(tree.left_out, outcomes, strict=True)
    ]


@dataclass
class Walk:
    """The walks of a batch from the roots of its trees to where they end.

    A token was chosen behind every node that was visited: the draft token that the walk goes on
    with, and behind the last node the bonus token. So a walk has as many entries as tokens, one
    more than draft tokens that were accepted, and ``kept`` entries mean: K/V of so many nodes, the
    root's among them, and so many new tokens, the last of which is the next root.

    Attributes:
        tree: what was verified.
        output: of the target, for all nodes of the tree.
        starts: [B] int, the position of each root.
        seq_lens: [B] int32, the same on the device.
        nodes: [B, S] int32, the nodes visited, the root first; behind them -1.
        tokens: [B, S] int32, the token chosen behind each, -1 behind the walk; -1 within it marks
            logits that were NaN or all -inf.
        entries: [B] int32, of each walk.
        kept: [B] int32, how many of them are committed: all, but for `Batch.limits`.
        on_host: ``kept`` on the host, once it has read the step.
        part_of: the step's own walk, of one that is told to a member of an ensemble.
    """

    tree: DraftTree
    output: ForwardOutput
    starts: Sequence[int]
    seq_lens: torch.Tensor
    nodes: torch.Tensor
    tokens: torch.Tensor
    entries: torch.Tensor
    kept: torch.Tensor
    on_host: Sequence[int] | torch.Tensor | None = None
    part_of: Walk | None = None

    @property
    def kept_on_host(self) -> Sequence[int]:
        """``kept``, for the host, which must have read the step."""
        if self.on_host is None and self.part_of is not None:
            return self.part_of.kept_on_host
        if isinstance(self.on_host, torch.Tensor):
            self.on_host = self.on_host.tolist()
        assert self.on_host is not None, "the step has not been read"
        return self.on_host

    def read(self) -> list[Outcome]:
        """Waits for the step."""
        parts = (self.entries[:, None], self.kept[:, None], self.nodes, self.tokens)
        length = self.nodes.shape[1]
        outcomes = [
            Outcome(entries - 1, rest[:entries], rest[length : length + kept])
            for entries, kept, *rest in torch.cat(parts, dim=1).tolist()
        ]
        self.on_host = [len(outcome.tokens) for outcome in outcomes]
        return outcomes
