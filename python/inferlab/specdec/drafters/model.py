"""Drafts of a smaller model: a chain or a tree of static shape, drafted level by level."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from inferlab import kernels
from inferlab.kernels import SamplingTensors
from inferlab.kernels.noise import PURPOSE_DRAFT, PURPOSE_TOKEN
from inferlab.models import ForwardBatch, ForwardOutput, KVCache, TargetModel
from inferlab.models.transfer import upload
from inferlab.scheduler import Sequence
from inferlab.specdec.batch import Batch
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.static import describe_shape, drafted_level
from inferlab.specdec.tree import Budget, DraftTree, TreeShape

CATCH_UP_CHUNK = 256


@dataclass(slots=True)
class Ground:
    """What the draft trees of R sequences grow from.

    Attributes:
        roots: [R] int32, target ids.
        positions: [R] int32, the roots' positions in the target's text, which key the noise.
        seq_lens: [R] int32, the roots' positions in the draft's text and cache.
        block_table: [R, max_pages] int32, of the draft's cache.
        sampling: one entry per sequence.
        vocab_size: columns of the target's logits; None: as many as the draft's.
        allowed_vocab: of the ids that are drafted, see `Batch`.
    """

    roots: torch.Tensor
    positions: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    sampling: SamplingTensors
    vocab_size: int | None = None
    allowed_vocab: int | None = None


class ModelDrafter(Drafter):
    """A draft model with its own K/V pool, addressed by the target's page tables.

    A node's children are the draft's best perturbed scores there, so siblings are a sample without
    replacement. With the target's noise (the default) the first child is the draft's guess of the
    very token that the target will choose, at any temperature.

    All sequences of a batch get trees of one shape, so where one of them is at the end of the draft
    model's context nothing is drafted for any until it has left the batch.

    Args:
        model: the draft model; same vocabulary as the target, however wide either pads it.
        cache: its K/V pool, with as many pages as the target's.
        shape: the largest tree; a step drafts the part of it that its budget allows.
        coupled: draw with the target's noise; False: with noise of its own.
        keep_logits: hand the draft's logits on, as the ``rejection`` policy needs, which also needs
            ``coupled=False``. Drafts are then drawn from these very logits by temperature and
            filters alone, without penalties, bias and ``min_tokens``' ban of end tokens: that is
            how verification reads them, and q must be the rule that drew.
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
    ) -> None:
        if coupled and keep_logits:
            raise ValueError(
                "keep_logits is for the rejection policy, which is biased when draft and target "
                "share their noise; give coupled=False with it"
            )
        self.model = model
        self.cache = cache
        self.shape = shape
        self.coupled = coupled
        self.keep_logits = keep_logits
        self.max_nodes = shape.num_nodes
        self.max_depth = shape.depth
        self._batch: Batch | None = None  # the one that _cached belongs to
        self._cached_of: dict[int, int] = {}  # by request, tokens whose K/V the cache holds
        self._cached = torch.empty(0, dtype=torch.int32)  # [B]: those of the batch, on the device

    def ladder(self) -> SequenceOf[Budget]:
        return super().ladder() if self.shape.is_chain else self.shape.ladder(self.max_depth)

    def propose(self, batch: Batch, budget: Budget) -> DraftTree:
        longest = max(len(s.tokens) for s in batch.sequences)
        if self.model.context_length is not None:
            budget = Budget(min(budget.levels, self.model.context_length - longest), budget.nodes)
        if budget.levels < 1:
            return DraftTree.root_only(batch.roots)
        shape = self.shape.within(budget)
        logits = self._catch_up(batch)
        seq_lens, table = batch.seq_lens, batch.block_table
        ground = Ground(
            batch.roots,
            seq_lens,
            seq_lens,
            table,
            batch.sampling,
            batch.vocab_size,
            batch.allowed_vocab,
        )
        return DraftTree.of_shape(shape, *self._grow(ground, shape, logits))

    def _grow(
        self, ground: Ground, shape: TreeShape, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Drafts level by level.

        Args:
            logits: [R, 1, V], the draft's at the roots.

        Returns:
            Tokens [R, N] and, with ``keep_logits``, the logits [R, N, V] they were drawn from.
        """
        size, device = len(ground.roots), ground.roots.device
        links = shape.links(size, device)
        tokens = torch.empty((size, shape.num_nodes), dtype=torch.int32, device=device)
        tokens[:, 0] = ground.roots
        kept: list[torch.Tensor] = []
        places = ground.seq_lens.to(torch.int64)[:, None]
        positions = places
        if ground.positions is not ground.seq_lens:
            positions = ground.positions.to(torch.int64)[:, None]
        purpose = PURPOSE_TOKEN if self.coupled else PURPOSE_DRAFT
        sampling = ground.sampling.without_penalties() if self.keep_logits else ground.sampling
        for depth, level in enumerate(shape.levels):
            same = positions is places
            positions = positions + 1
            places = positions if same else places + 1
            count = logits.shape[1]
            scores = self._scores(logits, ground)
            if self.keep_logits:
                kept.append(scores)
            drawn = kernels.sample(
                scores,
                positions.expand(-1, count).contiguous() if count > 1 else positions,
                sampling,
                purpose=purpose,
                num_samples=shape.widths[depth],
                allowed_vocab=ground.allowed_vocab,
            )
            children = drafted_level(drawn, shape, depth)
            tokens[:, level.start : level.stop] = children
            if depth + 1 < shape.depth:
                inputs = self._inputs(children)
                logits = self._forward_level(ground, shape, links, inputs, places, level.start)
        if not self.keep_logits:
            return tokens, None
        draft_logits = torch.cat(kept, dim=1)
        missing = shape.num_nodes - draft_logits.shape[1]  # leaves have no children
        return tokens, torch.nn.functional.pad(draft_logits, (0, 0, 0, missing))

    def _scores(self, logits: torch.Tensor, ground: Ground) -> torch.Tensor:
        """The draft's logits as logits of the tokens that it drafts: as wide as the target's."""
        missing = 0 if ground.vocab_size is None else ground.vocab_size - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits[..., : ground.vocab_size] if missing < 0 else logits

    def _inputs(self, tokens: torch.Tensor) -> torch.Tensor:
        """Drafted tokens as the draft model reads them."""
        return tokens.to(torch.int64)

    def _forward_level(
        self,
        ground: Ground,
        shape: TreeShape,
        links: kernels.TreeLinks,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        first_node: int,
    ) -> torch.Tensor:
        """Logits of one level's nodes, [R, M, V]. ``positions``: [R, 1], those of the level."""
        count = tokens.shape[1]
        ancestors = None
        seq_lens = ground.seq_lens
        node_offset = first_node
        if shape.is_chain:
            # Causal over everything before: no ancestor bits to read.
            seq_lens = seq_lens + first_node
            node_offset = 0
        else:
            ancestors = links.ancestors[:, first_node : first_node + count].contiguous()
        return self.model.forward(
            ForwardBatch(
                tokens=tokens,
                positions=positions.expand(-1, count),
                seq_lens=seq_lens,
                block_table=ground.block_table,
                ancestors=ancestors,
                node_offset=node_offset,
            ),
            self.cache,
        )

    def _catch_up(self, batch: Batch) -> torch.Tensor:
        """Forwards all tokens up to the roots that the draft's cache lacks: logits [B, 1, V]."""
        if self._batch is not batch:
            self._batch = batch
            cached = [self._cached_of.setdefault(s.request_id, 0) for s in batch.sequences]
            self._cached = upload(cached, np.int32, batch.device)
        pending = [self._lag(s) for s in batch.sequences]
        for i in range(len(pending)):
            while pending[i] > CATCH_UP_CHUNK:
                self._forward_tokens(batch, slice(i, i + 1), [CATCH_UP_CHUNK])
                pending[i] -= CATCH_UP_CHUNK
        return self._forward_tokens(batch, slice(None), pending)

    def _forward_tokens(self, batch: Batch, rows: slice, counts: list[int]) -> torch.Tensor:
        """Forwards the next ``counts`` uncached tokens of some sequences: last logits [R, 1, V]."""
        cached = self._cached[rows]
        longest = max(counts)
        even = min(counts) == longest
        positions = cached.to(torch.int64)[:, None] + torch.arange(longest, device=batch.device)
        # Behind a row's own tokens there may be a walk's -1; a prompt may hold ids of the target's
        # padding that the draft lacks.
        tokens = batch.history[rows].gather(1, positions).clamp(0, self.model.vocab_size - 1)
        if self.model.context_length is not None:
            positions = positions.clamp_max(self.model.context_length - 1)  # padding
        sequences = batch.sequences[rows]
        prompt_lens = None
        if any(self._cached_of[s.request_id] < len(s.prompt) for s in sequences):
            prompt_lens = upload([len(s.prompt) for s in sequences], np.int32, batch.device)
        logits = self.model.forward(
            ForwardBatch(
                tokens=tokens.to(torch.int64),
                positions=positions,
                seq_lens=cached,
                prompt_lens=prompt_lens,
                block_table=batch.block_table[rows],
                num_nodes=None if even else batch.lengths - cached,
                last_only=True,
            ),
            self.cache,
        )
        # Uneven counts run up to the roots.
        self._cached[rows] = cached + longest if even else batch.lengths
        for sequence, count in zip(sequences, counts, strict=True):
            self._cached_of[sequence.request_id] += count
        return logits

    def commit(
        self,
        batch: Batch,
        tree: DraftTree,
        nodes: torch.Tensor,
        kept: torch.Tensor,
        output: ForwardOutput,
    ) -> None:
        if tree.num_nodes == 1:
            return
        # The deepest level was drafted but not forwarded, so its K/V is missing.
        count = kept.clamp_max(max(tree.depths))
        if not tree.is_chain:
            self.cache.compact(batch.block_table, batch.seq_lens, nodes, count)
        torch.add(batch.seq_lens, count, out=self._cached)

    def settle(self, sequence: Sequence, tree: DraftTree, kept: int) -> None:
        if tree.num_nodes > 1:
            cached = sequence.num_cached + min(kept, max(tree.depths))
            self._cached_of[sequence.request_id] = cached

    def is_lagging(self, batch: Batch) -> bool:
        return any(self._lag(s) > 2 for s in batch.sequences)

    def _lag(self, sequence: Sequence) -> int:
        """Tokens up to and with the root that the cache lacks."""
        return len(sequence.tokens) - self._cached_of.get(sequence.request_id, 0)

    def release(self, sequence: Sequence) -> None:
        self._cached_of.pop(sequence.request_id, None)

    def describe(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "model": self.model.name,
            "tree": describe_shape(self.shape),
            "coupled_noise": self.coupled,
        }
