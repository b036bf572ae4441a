"""Grammars in a step: the target's logits, masked by what may follow the nodes of a tree."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch

from inferlab.models.transfer import upload
from inferlab.scheduler import Constraint, NodeMasks, Request
from inferlab.specdec.batch import Batch
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import DraftTree, parents_of


class Constrained:
    """The requests of a batch that have a constraint, and what these allow in a step's trees.

    Verification sees masked logits, so a draft token that is not allowed is never accepted and what
    is chosen is what plain decoding would choose under the same masks. All else sees the logits as
    they are.

    A request whose constraint fails ends with an error; the step goes on.
    """

    def __init__(self, batch: Batch, tree: DraftTree) -> None:
        self._batch = batch
        self._tree = tree
        self._places = [i for i, r in enumerate(batch.requests) if r.constraint is not None]
        if tree.num_nodes > 1:
            self._copy, self._copied = _to_host(tree)

    @classmethod
    def of(cls, batch: Batch, tree: DraftTree) -> Constrained | None:
        """For a step; None where nothing is constrained."""
        if all(request.constraint is None for request in batch.requests):
            return None
        return cls(batch, tree)

    def cut(self, policy: Policy) -> bool:
        """Takes nodes off the ends of the trees that no walk can come to, before they are
        verified; whether it did. On a CPU alone: elsewhere the host would wait for the draft, and
        graphs are kept by the shape of the tree.

        ``rejection`` must see that a draft token is rejected: those stay.
        """
        tree = self._tree
        if tree.num_nodes == 1 or self._batch.device.type != "cpu":
            return False
        counts = list(tree.node_counts)
        for place, allowed in self._allowed.items():
            wanted = allowed.reachable
            if policy.needs_draft_logits:
                _, parents = self._trees[place]
                wanted = wanted | (np.array(parents) >= 0) & wanted[parents]
            counts[place] = 1 + int(np.flatnonzero(wanted)[-1])
        return tree.cut(counts)

    @contextmanager
    def masked(self, logits: torch.Tensor) -> Generator[None]:
        """``logits`` [B, N, V] with what is not allowed at -inf, for the length of a ``with``
        block."""
        allowed = self._allowed
        if not allowed:
            yield
            return
        rows = [place for place, of in allowed.items() for _ in of.nodes]
        nodes = [node for of in allowed.values() for node in of.nodes]
        device = logits.device
        at = upload(rows, np.int64, device), upload(nodes, np.int64, device)
        bits = upload(np.concatenate([of.bits for of in allowed.values()]), np.uint8, device)
        each = upload([1 << bit for bit in range(8)], np.uint8, device)
        forbidden = (bits[:, :, None] & each).flatten(1) == 0
        own = logits[at]
        logits[at] = own.masked_fill(forbidden[:, : logits.shape[-1]], -torch.inf)
        try:
            yield
        finally:
            logits[at] = own

    @cached_property
    def _allowed(self) -> dict[int, NodeMasks]:
        """Of each constrained request, by its place, but for those whose constraint fails."""
        found = {}
        for place, (tokens, parents) in self._trees.items():
            request = self._batch.requests[place]
            assert request.constraint is not None
            try:
                _follow(request, request.constraint)
                found[place] = request.constraint.masks(tokens, parents)
            except Exception as error:
                _fail(request, error)
        return found

    @cached_property
    def _trees(self) -> dict[int, tuple[list[int], list[int]]]:
        """Tokens and parents of the nodes of each constrained request, by its place."""
        if self._tree.num_nodes == 1:
            roots = {place: self._batch.requests[place].tokens[-1:] for place in self._places}
            return {place: (root, [-1]) for place, root in roots.items()}
        if self._copied is not None:
            self._copied.synchronize()
        tokens, *links = self._copy[:, self._places].tolist()
        return dict(zip(self._places, zip(tokens, parents_of(*links), strict=True), strict=True))


def advance(request: Request) -> None:
    """Tells a request's constraint, if it has one, of its newest tokens; this may end it."""
    constraint = request.constraint
    if constraint is None or request.finished:
        return
    try:
        _follow(request, constraint)
        if constraint.is_complete:
            request.finish_reason = "stop"
    except Exception as error:
        _fail(request, error)


def end_without_token(request: Request) -> None:
    """Ends a request for which no token could be chosen, where that is its constraint's doing."""
    constraint = request.constraint
    if constraint is None or request.finished:
        return
    try:
        may_end = constraint.may_end()
        if may_end:
            request.finish_reason = "stop"
        elif may_end is False:
            raise ValueError("no token of the vocabulary is allowed by the grammar here")
    except Exception as error:
        _fail(request, error)


def _follow(request: Request, constraint: Constraint) -> None:
    """Has a constraint take in what it was not told of."""
    constraint.advance(request.tokens[len(request.prompt) + constraint.num_tokens :])


def _fail(request: Request, error: Exception) -> None:
    request.finish_reason = "error"
    request.error = str(error) or type(error).__name__


def _to_host(tree: DraftTree) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Tokens and links of a tree, [4, B, N] int32 on the host once the event has come: a copy that
    is queued before the forward does not wait for it."""
    links = tree.links
    there = torch.stack((tree.tokens, links.depth, links.first_child, links.next_sibling))
    if there.device.type != "cuda":
        return there.cpu(), None
    here = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
    here.copy_(there, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return here, event
