"""EAGLE: one decoder layer over the target's hidden states (Li et al., 2024, 2024b, 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from inferlab import kernels
from inferlab.kernels import GrownTree
from inferlab.kernels.noise import PURPOSE_DRAFT, PURPOSE_TOKEN
from inferlab.models import ForwardBatch, ForwardOutput, KVCache
from inferlab.models.draft_heads import PagedEagle, load_eagle
from inferlab.models.graphs import Tensors, power_of_two
from inferlab.scheduler import Request
from inferlab.specdec.acceptance import UNKNOWN, Known
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.captured import DraftGraphs
from inferlab.specdec.drafters.features import PendingFeatures
from inferlab.specdec.drafters.grown import Growth, drafted_of, drafted_tree, known_of_grown
from inferlab.specdec.drafters.held import HeldPages
from inferlab.specdec.drafters.plan import DrafterPlan, DraftRequest
from inferlab.specdec.drafters.static import describe_shape, drafted_level
from inferlab.specdec.drafters.writer import Ground
from inferlab.specdec.reading import Reading
from inferlab.specdec.tree import Budget, DraftTree, TreeShape, ladder
from inferlab.specdec.walk import Walk

MOST_PENDING = 256
"""Positions that may wait for the head while nothing is drafted; then it processes them."""


class EagleDrafter(Drafter):
    """Drafts with an EAGLE head, whose K/V lies in a cache of its own.

    The head pairs each token with the hidden state of the one before. What the target has verified
    is processed with the target's hidden states, at the next step's start; below that, each node
    takes the head's own output at its parent.

    Args:
        head: EAGLE-1/2 or EAGLE-3, on its device.
        cache: its K/V pool, with as many pages as the target's.
        shape: a static tree, or None: trees grown to where the head is sure (EAGLE-2).
        depth, width, nodes: of grown trees: levels; nodes expanded per level and children of each;
            nodes below the root.
        coupled: draw with the target's noise; False: with noise of its own.
        known: what was measured of its nodes.
    """

    name = "eagle"
    hears_all = True

    def __init__(
        self,
        head: PagedEagle,
        cache: KVCache,
        shape: TreeShape | None = None,
        *,
        depth: int = 6,
        width: int = 4,
        nodes: int = 31,
        coupled: bool = True,
        known: Known = UNKNOWN,
    ) -> None:
        self.head = head
        self.cache = cache
        self.shape = shape
        self.coupled = coupled
        self.depth = shape.depth if shape is not None else depth
        self.width = width
        self.nodes = shape.num_nodes - 1 if shape is not None else nodes
        self.feature_layers = head.head.feature_layers
        # Grown trees expand more nodes than they keep: the slots of all of them.
        drafted = self.nodes if shape is not None else max(nodes, width * (depth - 1))
        self.max_nodes = 1 + drafted
        self.max_depth = self.depth
        self._pending = PendingFeatures()
        self._held = HeldPages(cache.page_size, looks_ahead=True)
        self._graphs = DraftGraphs(head.device)
        self.known = known if shape is not None else known_of_grown(known, head.device)

    def ladder(self) -> Sequence[Budget]:
        if self.shape is None:
            return ladder(self.nodes, self.depth)
        return self.shape.ladder(self.depth)

    @torch.inference_mode()
    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        longest = max(len(r.tokens) for r in batch.requests)
        levels = min(budget.levels, self.head.context_length - longest)
        if levels < 1:
            return DraftTree.root_only(batch.roots)
        nodes = min(budget.nodes, self.nodes)
        shape = None if self.shape is None else self.shape.within(Budget(levels, budget.nodes))

        width, even, pending = self._take_pending(batch)

        def write(ground: Ground, pending: Tensors) -> Tensors:
            hidden = self._process(ground, pending, width, even)
            if shape is not None:
                return (self._fill(ground, shape, hidden),)
            grown = self._grow(ground, levels, nodes, hidden)
            return drafted_of(grown, judge)

        # A given target's embeddings and head may be exchanged.
        key = (shape or (levels, nodes, judge is None), even, self.head.weights_at)
        drafted = self._graphs.run(key, batch, pending, write)
        if shape is not None:
            return DraftTree.of_shape(shape, *drafted)
        return drafted_tree(drafted, levels, batch, judge)

    def _fill(self, ground: Ground, shape: TreeShape, hidden: torch.Tensor) -> torch.Tensor:
        """Tokens [B, N] of a static shape. ``hidden``: [B, 1, H] at the roots."""
        links = shape.links(len(ground.roots), ground.roots.device)
        levels = [ground.roots[:, None]]
        positions = ground.seq_lens.to(torch.int64)[:, None]
        parents = _level_parents(shape, ground.roots.device)
        for depth, level in enumerate(shape.levels):
            positions = positions + 1
            logits = self.head.logits(hidden)
            drawn = kernels.sample(
                logits,
                positions.expand(-1, logits.shape[1]).contiguous(),
                ground.sampling,
                purpose=PURPOSE_TOKEN if self.coupled else PURPOSE_DRAFT,
                num_samples=shape.widths[depth],
                allowed_vocab=ground.allowed_vocab,
            )
            levels.append(drafted_level(drawn, shape, depth))
            if depth + 1 < shape.depth:
                ancestors = None
                if not shape.is_chain:
                    ancestors = links.ancestors[:, level.start : level.stop].contiguous()
                hidden = self._expand(
                    ground,
                    levels[-1],
                    hidden.index_select(1, parents[depth]),
                    positions,
                    ancestors,
                    level.start,
                )
        return torch.cat(levels, dim=1)

    def _grow(self, ground: Ground, levels: int, nodes: int, hidden: torch.Tensor) -> GrownTree:
        """The ``nodes`` tokens that the head is surest of."""
        width = min(self.width, nodes)
        growth = Growth(ground.roots, width, levels)
        positions = ground.seq_lens.to(torch.int64)[:, None]
        for level in range(1, levels + 1):
            positions = positions + 1
            logits = self.head.logits(hidden)
            shape = (*logits.shape[:2], width)
            scores = torch.empty(shape, dtype=torch.float32, device=logits.device)
            drawn = kernels.sample(
                logits,
                positions.expand(-1, logits.shape[1]).contiguous(),
                ground.sampling,
                purpose=PURPOSE_TOKEN if self.coupled else PURPOSE_DRAFT,
                num_samples=width,
                allowed_vocab=ground.allowed_vocab,
                scores=scores,
            )
            frontier = growth.add(drawn, scores)
            if frontier is not None:
                parent = frontier.parents.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
                hidden = self._expand(
                    ground,
                    frontier.tokens,
                    hidden.gather(1, parent),
                    positions,
                    frontier.ancestors,
                    1 + (level - 1) * width,
                )
        return growth.tree(nodes)

    def _expand(
        self,
        ground: Ground,
        tokens: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        ancestors: torch.Tensor | None,
        slot: int,
    ) -> torch.Tensor:
        """The head's output at nodes of one level: tokens [B, M], features of their parents.

        ``slot``: of the first node; the root's is 0, which is the last committed pair's.
        """
        seq_lens = ground.seq_lens - 1
        if ancestors is None:
            seq_lens, slot = seq_lens + slot, 0
        # The pair of token p has position p - 1.
        at = (positions - 1).clamp_max(self.head.context_length - 1)
        return self.head.forward(
            ForwardBatch(
                tokens=tokens.to(torch.int64),
                positions=at.expand(-1, tokens.shape[1]),
                seq_lens=seq_lens,
                block_table=ground.block_table,
                ancestors=ancestors,
                node_offset=slot,
            ),
            features,
            self.cache,
        )

    def _take_pending(self, batch: Batch) -> tuple[int, bool, Tensors]:
        """All pairs up to the roots, which are taken as processed.

        Returns:
            P, the pairs of the longest row or more: one of a few numbers where drafts are captured;
            whether all rows have P; the texts [B, W], the pairs processed before [B], and
            features [B, P, F].
        """
        self._pending.enter(batch)
        counts = self._pending.counts(batch)
        width = max(counts)
        if self._graphs.captures:
            width = power_of_two(max(width, self.max_depth + 1))
        cached = self._pending.cached
        taken = batch.history, cached, self._pending.take(batch, width)
        return width, min(counts) == width, taken

    def _process(self, ground: Ground, pending: Tensors, width: int, even: bool) -> torch.Tensor:
        """The head's output at the last of the pending pairs, [B, 1, H]; see `_take_pending`."""
        history, cached, features = pending
        positions = cached.to(torch.int64)[:, None] + torch.arange(width, device=history.device)
        tokens = history.gather(1, positions + 1).clamp_min(0).to(torch.int64)
        positions = positions.clamp_max(self.head.context_length - 1)
        num_nodes = None if even else ground.seq_lens - cached
        hidden = self.head.forward(
            ForwardBatch(
                tokens=tokens,
                positions=positions,
                seq_lens=cached,
                block_table=ground.block_table,
                num_nodes=num_nodes,
            ),
            features,
            self.cache,
        )
        if num_nodes is None:
            return hidden[:, -1:]
        last = (num_nodes - 1).to(torch.int64)[:, None, None]
        return hidden.gather(1, last.expand(-1, 1, hidden.shape[-1]))

    @torch.inference_mode()
    def prefill(self, reading: Reading, output: ForwardOutput) -> None:
        assert output.features is not None
        self.head.forward(
            ForwardBatch(
                tokens=reading.following,
                positions=reading.positions.clamp_max(self.head.context_length - 1),
                seq_lens=reading.seq_lens,
                block_table=reading.block_table,
                num_nodes=reading.num_nodes,
            ),
            output.features,
            self.cache,
        )
        # The pair of the root is processed once more when drafting begins: from it the tree grows.
        for chunk, features in zip(reading.chunks, reading.by_chunk(output.features), strict=True):
            self._pending.start(chunk.request, features[-1:], max(chunk.stop - 1, 0))
            self._held.add(chunk.request, chunk.stop)

    @torch.inference_mode()
    def commit(self, batch: Batch, walk: Walk) -> None:
        self._pending.enter(batch)
        if max(self._pending.counts(batch)) >= MOST_PENDING:
            width, even, pending = self._take_pending(batch)
            self._process(Ground.of(batch), pending, width, even)
        self._pending.append(batch, walk)

    def unread(self, batch: Batch) -> list[int]:
        self._pending.enter(batch)
        return [max(n - self.max_depth - 1, 0) for n in self._pending.counts(batch)]

    def adopt(self, request: Request) -> int:
        return self._held.count(request)

    def release(self, request: Request) -> None:
        self._pending.release(request)

    def describe(self) -> dict[str, Any]:
        grown = {"grown": True, "depth": self.depth, "width": self.width, "nodes": self.nodes}
        return {
            "drafter": self.name,
            "version": self.head.head.version,
            "tree": grown if self.shape is None else describe_shape(self.shape),
            "coupled_noise": self.coupled,
        }


@lru_cache(maxsize=256)
def _level_parents(shape: TreeShape, device: torch.device) -> list[torch.Tensor]:
    """For each level: which node of the level before each of its nodes hangs on."""
    starts = [0, *(level.start for level in shape.levels)]
    return [
        torch.tensor([shape.parents[n] - start for n in level], device=device)
        for start, level in zip(starts, shape.levels, strict=False)
    ]


def plan(request: DraftRequest) -> DrafterPlan:
    """A trained EAGLE head."""
    config = request.config
    name = config.eagle.model
    with request.plain_target() as model:
        head = load_eagle(
            name,
            model,
            allow_pickle=config.allow_pickle,
            known_ids=request.target.tokenizer_vocab_size,
        )
    paged = PagedEagle(head)
    shape = None if request.grows else request.shape("grown", request.max_levels, name)
    known = request.known(shape, name, request.max_levels)

    def build(pages: int) -> Drafter:
        return EagleDrafter(
            paged,
            paged.new_cache(pages, config.page_size),
            shape,
            depth=request.max_levels,
            width=config.tree_width,
            nodes=config.nodes,
            coupled=config.coupled_noise,
            known=known,
        )

    return DrafterPlan(build, paged.new_cache(1, config.page_size).bytes_per_token, name)
