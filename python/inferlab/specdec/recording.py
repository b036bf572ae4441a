"""Recording decoding steps, to be replayed later (`inferlab.specdec.replay`). The files, and what
is in them, are those of `inferlab.specdec.recorded`."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inferlab import _C, kernels
from inferlab.models import ForwardOutput
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
from inferlab.specdec.drafters import Drafter, ModelDrafter
from inferlab.specdec.recorded import (
    CATCHING_UP,
    COLUMNS,
    DECODING,
    FIRST,
    MOST_PLACES,
    NO_KIND,
    NO_LIMIT,
    PHASES,
    begin_run,
    write_part,
)
from inferlab.specdec.step import Clock
from inferlab.specdec.token_odds import at_each_node, token_odds
from inferlab.specdec.tree import NO_DRAFT, Budget, DraftTree, are_chains
from inferlab.specdec.walk import Outcome

logger = logging.getLogger(__name__)

PART_NODES = 65536
"""Of a part, about; the last one, which may have fewer, is written again and again."""
PART_S = 30.0
"""What was decoded longer ago than that is on disk."""

_NODE_COLUMNS = ("token", "parent", "choice", "place", "probability", "drafted")


class Recorder:
    """Keeps what each step drafted, chose and took, and writes it by parts.

    The engine has it ``listen`` to what a step drafts, calls ``look`` before it is committed,
    ``keep`` after it, and ``timed`` around all that it does. Its own time is part of no step.

    Args:
        folder: of recordings; this one becomes a run in it.
        about: facts of the run.

    Raises:
        UsageError: the folder holds other things or cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], about: Mapping[str, Any]) -> None:
        self._folder = Path(folder)
        self._about = dict(about)
        self._begin()

    def _begin(self) -> None:
        self.run = begin_run(self._folder)
        self._process = os.getpid()
        self._start = self._written_at = time.perf_counter()
        self._own_s = 0.0
        self._number = 1
        self._rest_ms = 0.0
        self._known: set[int] = set()
        self._totals: dict[str, float] | None = None
        self._failed = False
        self._clear()

    def _clear(self) -> None:
        self._columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._num_nodes = 0
        self._changed = False
        self._seen: tuple[torch.Tensor, list[int]] | None = None
        self._listener: Any = None

    def listen(self, drafter: Drafter, judge: Judge | None) -> Judge | None:
        """Who is to be told of a step's drafts, so that it is noted what is said of them."""
        self._listener = None
        compiled = judge is None or isinstance(judge, _C.planner.Judge)
        if self._failed or not (drafter.known.asks and compiled):
            return judge
        listener: Judge = _C.planner.Listener(judge)
        self._listener = listener
        return listener

    @contextlib.contextmanager
    def timed(self, clock: Clock, idle: Callable[[], bool]) -> Iterator[None]:
        """Around a step of the engine's: what its clock does not tell goes to "rest".

        Args:
            idle: whether nothing is left to decode: all is written then.
        """
        if self._process != os.getpid():  # a child of fork
            self._begin()
        if self._totals is None:
            self._totals = dict(clock.totals)
        begin, own, told = time.perf_counter(), self._own_s, sum(clock.totals.values())
        steps = len(self._columns["step.ms"])
        try:
            yield
        finally:
            self._seen = None
            spent = (time.perf_counter() - begin - (self._own_s - own)) * 1e3
            self._rest_ms += max(spent - (sum(clock.totals.values()) - told), 0.0)
            if len(self._columns["step.ms"]) > steps:
                self._columns["step.ms"][-1][-1] += self._rest_ms
                self._rest_ms = 0.0
        late = time.perf_counter() - self._written_at > PART_S
        if late or self._num_nodes >= PART_NODES or idle():
            self.write()

    def look(self, batch: Batch, tree: DraftTree, output: ForwardOutput) -> None:
        """What the target would choose at each node, and how it likes the drafts; before the
        batch moves on."""
        if self._failed:
            return
        with self._on_own_time():
            logits, sampling = output.logits, batch.sampling
            parents = _parents(tree)
            positions = (batch.seq_lens[:, None] + tree.links.depth + 1).to(torch.int64)
            positions = positions.clamp_min(0).contiguous()
            each = at_each_node(sampling, tree) if sampling.uses_context else None
            if each is None:
                found = kernels.sample(
                    logits, positions, sampling, allowed_vocab=batch.allowed_vocab
                )
            else:
                rows, at = logits.reshape(-1, logits.shape[-1]), positions.view(-1)
                found = kernels.sample(rows, at, each, allowed_vocab=batch.allowed_vocab)
            choices = found.view(parents.shape)
            odds, places = token_odds(
                logits, tree.tokens, parents, sampling, batch.allowed_vocab, each
            )
            odds[:, 0], places[:, 0] = torch.nan, 0  # nobody drafted the root
            drafted = torch.full_like(odds, torch.nan)
            if tree.draft_logits is not None:
                drafted, _ = token_odds(
                    tree.draft_logits,
                    tree.tokens,
                    parents,
                    sampling.without_penalties(),
                    batch.allowed_vocab,
                )
                drafted[:, 0] = torch.nan
            limits = batch.limits
            kept = torch.full_like(batch.seq_lens, NO_LIMIT) if limits is None else limits
            whole = (tree.tokens, parents, choices, places.clamp_max(MOST_PLACES))
            columns = [column.to(torch.int32) for column in whole]
            columns += [p.to(torch.float32).view(torch.int32) for p in (odds, drafted)]
            columns.append(kept.clamp_max(NO_LIMIT).to(torch.int32)[:, None].expand_as(parents))
            self._seen = torch.stack(columns), [r.num_cached for r in batch.requests]

    def keep(
        self,
        batch: Batch,
        tree: DraftTree,
        outcomes: Sequence[Outcome],
        emitted: Sequence[int],
        clock: Clock,
        budget: Budget | None,
        lagging: bool = False,
    ) -> None:
        """A step, once the requests have their tokens.

        Args:
            emitted: tokens that each request got.
            budget: that was drafted at most; None: first tokens.
            lagging: the drafter had to catch up.
        """
        if self._failed:
            return
        with self._on_own_time():
            assert self._seen is not None, "look was not called"
            assert self._totals is not None, "not within timed"
            seen, roots = self._seen
            self._seen = None
            kind = FIRST if budget is None else CATCHING_UP if lagging else DECODING
            levels, nodes = NO_DRAFT if budget is None else budget
            spent = [clock.totals[p] - self._totals.get(p, 0.0) for p in PHASES[:-1]]
            self._totals = dict(clock.totals)
            add = self._add
            add("step", kind=kind, rows=len(batch), levels=levels, budget=nodes)
            add("step", at_s=time.perf_counter() - self._start, ms=[*spent, 0.0])
            host = seen.cpu().numpy()
            counts = np.asarray(tree.node_counts)
            real = np.arange(host.shape[2]) < counts[:, None]
            for name, values in zip(_NODE_COLUMNS, host, strict=False):
                self._columns[f"node.{name}"].append(values[real])
            ranks = tree.ranks if tree.ranks is not None else range(host.shape[2])
            place = np.broadcast_to(np.asarray(ranks), real.shape)
            self._columns["node.rank"].append(place[real])
            self._columns["node.kind"].append(self._kinds(batch, place)[real])
            for i, (request, outcome) in enumerate(zip(batch.requests, outcomes, strict=True)):
                if request.request_id not in self._known:
                    self._known.add(request.request_id)
                    p = request.params
                    add("request", id=request.request_id, prompt=len(request.prompt))
                    add("request", most=p.max_tokens, seed=p.seed, heat=p.temperature)
                add("row", request=request.request_id, root=roots[i], nodes=tree.node_counts[i])
                add("row", depth=tree.depths[i], accepted=outcome.accepted)
                add("row", limit=int(host[-1, i, 0]), emitted=emitted[i])
                tokens = request.tokens[len(request.tokens) - emitted[i] :]
                self._columns["emitted.token"].append(tokens)
            self._num_nodes += int(counts.sum())
            self._changed = True

    def _kinds(self, batch: Batch, place: np.ndarray) -> np.ndarray:
        """[B, N] of nodes whose ranks are ``place``."""
        kinds = np.full(place.shape, NO_KIND)
        listener, self._listener = self._listener, None
        if listener is not None:
            told = dict(zip(listener.requests, listener.kinds, strict=True))
            for row, ranks, request in zip(kinds, place, batch.requests, strict=True):
                of_nodes = np.array([NO_KIND, *told.get(request.request_id, ())])
                known = ranks < len(of_nodes)
                row[known] = of_nodes[ranks[known]]
        return kinds

    def _add(self, table: str, **values: Any) -> None:
        for name, value in values.items():
            self._columns[f"{table}.{name}"].append(value)

    def write(self) -> None:
        """Puts on disk what is not there. A disk that is full ends the recording, not the run."""
        if not self._changed or self._failed or self._process != os.getpid():
            return
        try:
            write_part(self.run, self._number, self._as_arrays(), self._about)
        except OSError as error:
            logger.warning("the recording in %s ends here: %s", self.run, error.strerror or error)
            self._failed = True
        self._changed = False
        self._written_at = time.perf_counter()
        if self._failed or self._num_nodes >= PART_NODES:
            self._number += 1
            self._clear()

    def _as_arrays(self) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for name, values in self._columns.items():
            if name.startswith(("node.", "emitted.")):
                flat = np.concatenate([np.asarray(v) for v in values] or [np.zeros(0, np.int32)])
                floats = COLUMNS[name] is np.float32
                arrays[name] = (
                    flat.astype(np.int32).view(np.float32) if floats else flat.astype(np.int64)
                )
            elif name == "request.seed":
                arrays[name] = np.asarray(values, np.uint64).view(np.int64)
            elif name == "step.ms":
                arrays[name] = np.asarray(values, np.float32).reshape(-1, len(PHASES))
            else:
                arrays[name] = np.asarray(values)
        return arrays

    @contextlib.contextmanager
    def _on_own_time(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._own_s += time.perf_counter() - begin


def describe_tree(drafter: Drafter | None) -> dict[str, Any]:
    """What of a drafter's tree decides which others a record of it covers.

    * ``form``: "chain"; "static", cut from one shape; "grown", the surest nodes of what was
      expanded; "merged", anything else;
    * ``levels``, ``nodes``: of its largest tree;
    * ``width``: of a grown one, nodes drafted per level: with fewer nodes it weighs them otherwise;
    * ``remembers``: it learns from the trees that were verified, so other trees before would have
      made it draft other tokens;
    * ``by_text``: what it drafts behind a token hangs on the text up to that token alone.
    """
    if drafter is None:
        facts = {"form": "chain", "levels": 0, "nodes": 0, "width": 0}
        return {**facts, "remembers": False, "by_text": True}
    ladder = drafter.ladder()
    levels = max((b.levels for b in ladder), default=0)
    nodes = max((b.nodes for b in ladder), default=0)
    described = drafter.describe()
    tree = described.get("tree")
    grown = isinstance(tree, Mapping) and bool(tree.get("grown"))
    if are_chains(ladder):
        form = "chain"
    elif getattr(drafter, "shape", None) is not None:
        form = "static"
    else:
        form = "grown" if grown else "merged"
    width = int(tree.get("width", nodes)) if grown and tree is not None else 0
    remembers = drafter.name in ("recycling", "ensemble")
    return {
        "form": form,
        "levels": levels,
        "nodes": nodes,
        "width": width,
        "remembers": remembers,
        "by_text": type(drafter) is ModelDrafter and form == "chain",
    }


def _parents(tree: DraftTree) -> torch.Tensor:
    """[B, N] int64: the number of each node's parent; 0 of roots and padding."""
    links, count = tree.links, tree.num_nodes
    nodes = torch.arange(count, device=tree.tokens.device)
    if tree.is_chain:
        return (nodes - 1).clamp_min(0).expand(tree.tokens.shape)
    bits = (links.ancestors[:, :, nodes // 64] >> (nodes % 64)) & 1  # [B, N, N], the node's too
    return (bits * nodes * (nodes < nodes[:, None])).amax(2)
