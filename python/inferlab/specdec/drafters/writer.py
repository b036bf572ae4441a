"""How a draft model writes a tree of static shape: a forward for all nodes of a level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from inferlab import kernels
from inferlab.kernels import SamplingTensors
from inferlab.kernels.noise import PURPOSE_DRAFT, PURPOSE_TOKEN
from inferlab.models import ForwardBatch, KVCache, TargetModel
from inferlab.specdec.batch import Batch
from inferlab.specdec.drafters.static import drafted_level
from inferlab.specdec.drafters.watched import Watched
from inferlab.specdec.tree import TreeShape


class Vocabulary(Protocol):
    """How logits and ids of the draft model are those of the tokens that it drafts."""

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """The draft's logits [R, M, .] as logits of drafted tokens."""
        ...

    def inputs(self, tokens: torch.Tensor) -> torch.Tensor:
        """Drafted tokens as int64 ids that the draft model reads."""
        ...


@dataclass(frozen=True)
class SameVocabulary:
    """Of a draft whose ids are the target's, however wide either pads them.

    Attributes:
        size: columns of the target's logits; None: as many as the draft's.
    """

    size: int | None

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        missing = 0 if self.size is None else self.size - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        return logits[..., : self.size] if missing < 0 else logits

    def inputs(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.to(torch.int64)


@dataclass(slots=True)
class Ground:
    """What the draft trees of R requests grow from.

    Attributes:
        roots: [R] int32, target ids.
        positions: [R] int32, the roots' positions in the target's text, which key the noise.
        seq_lens: [R] int32, the roots' positions in the draft's text and cache.
        block_table: [R, max_pages] int32, of the draft's cache.
        sampling: one entry per request.
        allowed_vocab: of the ids that are drafted, see `Batch`.
    """

    roots: torch.Tensor
    positions: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    sampling: SamplingTensors
    allowed_vocab: int | None = None

    @classmethod
    def of(cls, batch: Batch) -> Ground:
        """Of a draft that reads what the target reads."""
        return cls(
            batch.roots,
            batch.seq_lens,
            batch.seq_lens,
            batch.block_table,
            batch.sampling,
            batch.allowed_vocab,
        )


class TreeWriter:
    """Writes draft trees with a model.

    A node's children are the draft's best perturbed scores there, so siblings are a sample without
    replacement. With the target's noise the first child is the draft's guess of the very token that
    the target will choose, at any temperature.

    Args:
        model: the draft model.
        cache: its K/V pool.
        coupled: draw with the target's noise; False: with noise of its own.
        keep_logits: hand on the logits that drafts were drawn from, as the ``rejection`` policy
            needs, which also needs ``coupled=False``. Drafts are then drawn by temperature and
            filters alone, without penalties, bias and ``min_tokens``' ban of end tokens: that is
            how verification reads these logits, and q must be the rule that drew.
    """

    def __init__(
        self, model: TargetModel, cache: KVCache, *, coupled: bool, keep_logits: bool
    ) -> None:
        if coupled and keep_logits:
            raise ValueError(
                "keep_logits is for the rejection policy, which is biased when draft and target "
                "share their noise; give coupled=False with it"
            )
        self.model = model
        self.cache = cache
        self.coupled = coupled
        self.keep_logits = keep_logits

    @property
    def purpose(self) -> int:
        """What its draws are for."""
        return PURPOSE_TOKEN if self.coupled else PURPOSE_DRAFT

    def write(
        self,
        ground: Ground,
        shape: TreeShape,
        logits: torch.Tensor,
        vocabulary: Vocabulary,
        watched: Watched | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Drafts level by level.

        Args:
            logits: [R, 1, .], the draft's at the roots.
            watched: of chains: says after each level whether to go on.

        Returns:
            Tokens [R, N], of the levels that were drafted, and, with ``keep_logits``, the logits
            [R, N, V] they were drawn from.
        """
        size, device = len(ground.roots), ground.roots.device
        links = shape.links(size, device)
        tokens = torch.empty((size, shape.num_nodes), dtype=torch.int32, device=device)
        tokens[:, 0] = ground.roots
        kept: list[torch.Tensor] = []
        sampling = ground.sampling.without_penalties() if self.keep_logits else ground.sampling
        positions = _ahead(ground.positions, shape.depth)
        places = positions
        if ground.seq_lens is not ground.positions:
            places = _ahead(ground.seq_lens, shape.depth)
        for depth, level in enumerate(shape.levels):
            count = logits.shape[1]
            scores = vocabulary.scores(logits)
            if self.keep_logits:
                kept.append(scores)
            rivals = None
            if watched is not None:
                rivals = torch.empty((size, 1, 2), dtype=torch.float32, device=device)
            drawn = kernels.sample(
                scores,
                _for_each(positions[depth], count),
                sampling,
                purpose=self.purpose,
                num_samples=shape.widths[depth] if rivals is None else 2,
                allowed_vocab=ground.allowed_vocab,
                scores=rivals,
            )
            children = drafted_level(drawn if rivals is None else drawn[..., :1], shape, depth)
            tokens[:, level.start : level.stop] = children
            if watched is not None and rivals is not None and not watched.goes_on(rivals):
                tokens = tokens[:, : level.stop]
                break
            if depth + 1 < shape.depth:
                inputs = vocabulary.inputs(children)
                logits = self._forward_level(ground, shape, links, inputs, places[depth], level)
        if not self.keep_logits:
            return tokens, None
        draft_logits = torch.cat(kept, dim=1)
        missing = tokens.shape[1] - draft_logits.shape[1]  # leaves have no children
        return tokens, torch.nn.functional.pad(draft_logits, (0, 0, 0, missing))

    def _forward_level(
        self,
        ground: Ground,
        shape: TreeShape,
        links: kernels.TreeLinks,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        level: range,
    ) -> torch.Tensor:
        """Logits of one level's nodes, [R, M, .]. ``positions``: [R, 1], those of the level."""
        ancestors = None
        seq_lens = ground.seq_lens
        node_offset = level.start
        if shape.is_chain:
            # Causal over everything before: no ancestor bits to read.
            seq_lens = seq_lens + level.start
            node_offset = 0
        else:
            ancestors = links.ancestors[:, level.start : level.stop].contiguous()
        return self.model.forward(
            ForwardBatch(
                tokens=tokens,
                positions=positions.expand(-1, tokens.shape[1]),
                seq_lens=seq_lens,
                block_table=ground.block_table,
                ancestors=ancestors,
                node_offset=node_offset,
            ),
            self.cache,
        ).logits


def _ahead(starts: torch.Tensor, levels: int) -> Sequence[torch.Tensor]:
    """Positions of each level below those of the roots: [R, 1] int64 each."""
    first = starts.to(torch.int64)[:, None]
    return [first + depth for depth in range(1, levels + 1)]


def _for_each(positions: torch.Tensor, count: int) -> torch.Tensor:
    """[R, 1] to [R, count]."""
    return positions.expand(-1, count).contiguous() if count > 1 else positions
