"""Drafts of a smaller model: a chain or a tree of static shape, drafted level by level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from inferlab import _C
from inferlab.models import ForwardBatch, HFModel, KVCache, TargetModel, last_rows
from inferlab.models.graphs import Tensors, power_of_two
from inferlab.models.transfer import upload
from inferlab.scheduler import READ_TOKENS, Chunk, Request
from inferlab.specdec.acceptance import SURE, UNKNOWN, Known
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.captured import DraftGraphs
from inferlab.specdec.drafters.examination import Examination
from inferlab.specdec.drafters.held import HeldPages
from inferlab.specdec.drafters.static import describe_shape
from inferlab.specdec.drafters.watched import Watched
from inferlab.specdec.drafters.writer import Ground, SameVocabulary, TreeWriter
from inferlab.specdec.reading import PIECE, Reading
from inferlab.specdec.tree import Budget, DraftTree, TreeShape
from inferlab.specdec.walk import Walk


class ModelDrafter(Drafter):
    """A draft model with its own K/V pool, addressed by the target's page tables.

    All requests of a batch get trees of one shape, so where one of them is at the end of the draft
    model's context nothing is drafted for any until it has left the batch.

    Args:
        model: the draft model; same vocabulary as the target, however wide either pads it.
        cache: its K/V pool, with as many pages as the target's.
        shape: the largest tree; a step drafts the part of it that its budget allows.
        coupled, keep_logits: see `TreeWriter`.
        known: what it says of its nodes. Chains are told apart by how sure the model is of them,
            where the host can read that without waiting for a device.
    """

    name = "vanilla"
    keeps_nodes = True

    def __init__(
        self,
        model: TargetModel,
        cache: KVCache,
        shape: TreeShape,
        *,
        coupled: bool = True,
        keep_logits: bool = False,
        known: Known = UNKNOWN,
    ) -> None:
        self.model = model
        self.known = known
        self.cache = cache
        self.shape = shape
        self.max_nodes = shape.num_nodes
        self.max_depth = shape.depth
        self._writer = TreeWriter(model, cache, coupled=coupled, keep_logits=keep_logits)
        self._graphs = DraftGraphs(model.device)
        if shape.is_chain and model.device.type == "cpu":
            self.known = known._replace(by_kind=SURE, asks=True, examines=coupled)
        self._held = HeldPages(cache.page_size)
        self._cached_of: dict[int, int] = {}  # by request, tokens whose K/V the cache holds
        self._walked: tuple[Batch, Walk] | None = None  # a step that _cached_of does not count yet
        self._batch: Batch | None = None  # the one that _cached belongs to
        self._cached = torch.empty(0, dtype=torch.int32)  # [B]: those of the batch, on the device

    def ladder(self) -> Sequence[Budget]:
        return self.shape.ladder(self.max_depth)

    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        longest = max(len(r.tokens) for r in batch.requests)
        if self.model.context_length is not None:
            budget = Budget(min(budget.levels, self.model.context_length - longest), budget.nodes)
        if budget.levels < 1:
            return DraftTree.root_only(batch.roots)
        shape = self.shape.within(budget)
        vocabulary = SameVocabulary(batch.vocab_size)
        if not self._catch_up(batch, judge):
            return DraftTree.root_only(batch.roots)

        built = self.model.built if isinstance(self.model, HFModel) else None
        if built is not None and judge is None:
            # Shapes should be few. Behind drafts one or two tokens are unread.
            width = power_of_two(max(self._widest_tail(batch), 2))

            def write(ground: Ground, tail: Tensors) -> Tensors:
                logits = self._read_tail(ground, tail, width, even=False)
                return self._writer.write(ground, shape, logits, vocabulary)

            key = shape, vocabulary, width, built
            drafted = self._graphs.run(key, batch, self._take_tail(batch), write)
            return DraftTree.of_shape(shape, *drafted)
        ground, width = Ground.of(batch), self._widest_tail(batch)
        even = all(self._lag(r) == width for r in batch.requests)
        logits = self._read_tail(ground, self._take_tail(batch), width, even)
        if not shape.is_chain:
            return DraftTree.of_shape(shape, *self._writer.write(ground, shape, logits, vocabulary))
        if tree := self._native_chains(ground, shape, logits, judge, batch):
            return tree
        watched = None if judge is None else Watched(judge, batch)
        tokens, kept = self._writer.write(ground, shape, logits, vocabulary, watched)
        if watched is None:
            return DraftTree.of_shape(shape, tokens, kept)
        return DraftTree.chains(tokens, watched.counts(), kept)

    def _native_chains(
        self,
        ground: Ground,
        shape: TreeShape,
        logits: torch.Tensor,
        judge: Judge | None,
        batch: Batch,
    ) -> DraftTree | None:
        """Chains that are drafted in one call; None where that does not cover what is wanted."""
        vocab = batch.vocab_size or logits.shape[-1]
        if not isinstance(self.model, HFModel) or self.model.device.type != "cpu":
            return None
        if self._writer.keep_logits:
            return None
        if logits.shape[-1] < vocab or ground.sampling.changes_logits:
            return None
        if judge is not None and not isinstance(judge, _C.planner.Judge):
            return None
        tokens = torch.empty((len(batch), shape.num_nodes), dtype=torch.int32)
        tokens[:, 0] = ground.roots
        drafted = self.model.draft_chain(
            tokens,
            logits,
            vocab if batch.allowed_vocab is None else min(batch.allowed_vocab, vocab),
            ground.positions,
            ground.seq_lens,
            ground.block_table,
            self.cache,
            ground.sampling,
            self._writer.purpose,
            judge,
            [request.request_id for request in batch.requests],
        )
        if drafted is None:
            return None
        levels, counts = drafted
        tokens = tokens[:, : 1 + levels]
        if counts is None:
            return DraftTree.of_shape(shape, tokens)
        return DraftTree.chains(tokens, counts)

    def _catch_up(self, batch: Batch, judge: Judge | None) -> bool:
        """Reads texts of which the draft's cache lacks more than a few tokens; whether to draft on.

        Here, before its first draft, and not while a text's first token is waited for. What is read
        then tells a judge whether drafts would have been right.
        """
        self._count_walked()
        if any(r.request_id not in self._cached_of for r in batch.requests):
            self.model.notice_changes()
        examination = None
        if judge is not None and self.known.examines and not batch.sampling.changes_logits:
            examination = Examination(batch, self._writer.purpose, judge)
        for chunks in _parted([self._missing(r) for r in batch.requests if self._lag(r) > PIECE]):
            self._read(Reading(chunks, batch.device), examination)
        if self._batch is not batch:
            self._batch = batch
            cached = [self._cached_of.get(r.request_id, 0) for r in batch.requests]
            self._cached = upload(cached, np.int32, batch.device)
        return examination is None or examination.passed()

    def _read(self, reading: Reading, examination: Examination | None) -> None:
        """Forwards what is behind the K/V that the cache holds."""
        batch = reading.batch
        positions = batch.positions
        if self.model.context_length is not None:
            positions = positions.clamp_max(self.model.context_length - 1)  # not drafted for
        batch = replace(batch, tokens=self._known(batch.tokens), positions=positions)
        if examination is not None:
            batch = replace(batch, scored=examination.rows(reading))
        output = self.model.forward(batch, self.cache)
        if examination is not None:
            examination.mark(output.logits)
        for chunk in reading.chunks:
            self._cached_of[chunk.request.request_id] = chunk.stop
            self._held.add(chunk.request, chunk.stop)
        self._batch = None

    def _widest_tail(self, batch: Batch) -> int:
        return max(self._lag(r) for r in batch.requests)

    def _take_tail(self, batch: Batch) -> Tensors:
        """The last few tokens up to the roots, which are taken as read: history [B, W] and its
        lengths [B], and how many of them are in the cache [B]."""
        tail = batch.history, batch.lengths, self._cached
        self._cached = batch.lengths.clone()
        for request in batch.requests:
            self._cached_of[request.request_id] = len(request.tokens)
        return tail

    def _read_tail(self, ground: Ground, tail: Tensors, width: int, even: bool) -> torch.Tensor:
        """Forwards what `_take_tail` took: logits at the roots, [B, 1, V].

        Args:
            width: tokens of the longest one, or more.
            even: whether all are as long.
        """
        history, lengths, cached = tail
        positions = cached.to(torch.int64)[:, None] + torch.arange(width, device=history.device)
        tokens = self._known(history.gather(1, positions)).to(torch.int64)
        if self.model.context_length is not None:
            positions = positions.clamp_max(self.model.context_length - 1)  # padding
        num_nodes = None if even else lengths - cached
        return self.model.forward(
            ForwardBatch(
                tokens=tokens,
                positions=positions,
                seq_lens=cached,
                block_table=ground.block_table,
                num_nodes=num_nodes,
                scored=last_rows(tokens, num_nodes),
            ),
            self.cache,
        ).logits

    def _known(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ids that the draft has: behind a row's own tokens there may be a walk's -1, and a prompt
        may hold ids of the target's padding."""
        return tokens.clamp(0, self.model.vocab_size - 1)

    def commit(self, batch: Batch, walk: Walk) -> None:
        self._count_walked()
        if walk.tree.num_nodes == 1:
            return
        # The deepest level was drafted but not forwarded, so its K/V is missing.
        count = walk.kept.clamp_max(max(walk.tree.depths))
        if not walk.tree.is_chain:
            self.cache.compact(batch.block_table, walk.seq_lens, walk.nodes, count)
        self._cached = walk.seq_lens + count
        self._walked = batch, walk

    def unread(self, batch: Batch) -> list[int]:
        self._count_walked()
        return [max(self._lag(r) - 2, 0) for r in batch.requests]

    def adopt(self, request: Request) -> int:
        if held := self._held.count(request):
            self._cached_of[request.request_id] = held
        return request.num_cached

    def release(self, request: Request) -> None:
        self._cached_of.pop(request.request_id, None)

    def describe(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "model": self.model.name,
            "tree": describe_shape(self.shape),
            "coupled_noise": self._writer.coupled,
        }

    def _count_walked(self) -> None:
        """Counts what the cache holds since the last step, which the host has read by now."""
        if self._walked is None:
            return
        batch, walk = self._walked
        self._walked = None
        deepest = max(walk.tree.depths)
        for request, start, kept in zip(
            batch.requests, walk.starts, walk.kept_on_host, strict=True
        ):
            if request.request_id in self._cached_of:
                self._cached_of[request.request_id] = start + min(kept, deepest)

    def _lag(self, request: Request) -> int:
        """Tokens up to and with the root that the cache lacks."""
        return len(request.tokens) - self._cached_of.get(request.request_id, 0)

    def _missing(self, request: Request) -> Chunk:
        """All before the root that the cache lacks."""
        return Chunk(request, self._cached_of.get(request.request_id, 0), len(request.tokens) - 1)


def _parted(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks in groups of at most READ_TOKENS tokens, long ones in parts."""
    group: list[Chunk] = []
    left = READ_TOKENS
    for chunk in chunks:
        start = chunk.start
        while start < chunk.stop:
            stop = min(start + left, chunk.stop)
            group.append(Chunk(chunk.request, start, stop))
            left -= stop - start
            start = stop
            if left == 0:
                yield group
                group, left = [], READ_TOKENS
    if group:
        yield group
