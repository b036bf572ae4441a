"""Medusa: heads on the target's last hidden state, one per offset (Cai et al., 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from inferlab import kernels
from inferlab.kernels import GrownTree
from inferlab.kernels.noise import PURPOSE_DRAFT, PURPOSE_TOKEN
from inferlab.models import FINAL_HIDDEN, ForwardOutput
from inferlab.models.draft_heads import MedusaHeads, load_medusa
from inferlab.models.graphs import Tensors
from inferlab.scheduler import Request
from inferlab.specdec.acceptance import UNKNOWN, Known
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.captured import DraftGraphs
from inferlab.specdec.drafters.features import LastFeatures
from inferlab.specdec.drafters.grown import drafted_of, drafted_tree, known_of_grown
from inferlab.specdec.drafters.plan import DrafterPlan, DraftRequest
from inferlab.specdec.drafters.static import describe_shape, tree_of_offsets
from inferlab.specdec.drafters.writer import Ground
from inferlab.specdec.reading import Reading
from inferlab.specdec.tree import Budget, DraftTree, TreeShape, ladder
from inferlab.specdec.walk import Walk


class MedusaDrafter(Drafter):
    """Drafts a tree from one pass of the heads.

    Head i scores the tokens of depth i + 1 whatever the path there: a node's token is its head's
    best one of some rank, drawn with the target's own noise at that position.

    Args:
        heads: trained for the target.
        shape: a static tree, at most as deep as there are heads, or None: trees grown to where the
            heads are sure (how sure, is said in `growth`).
        nodes: of grown trees, below the root.
        depth: of grown trees; all heads where it is left out.
        coupled: draw with the target's noise; False: with noise of its own.
        known: what was measured of its nodes.
    """

    name = "medusa"
    hears_all = True
    feature_layers = (FINAL_HIDDEN,)

    GROWN_WIDTH = 32  # tokens of each depth that a grown tree chooses from

    def __init__(
        self,
        heads: MedusaHeads,
        shape: TreeShape | None = None,
        *,
        nodes: int = 31,
        depth: int | None = None,
        coupled: bool = True,
        known: Known = UNKNOWN,
    ) -> None:
        levels = shape.depth if shape is not None else depth or heads.num_heads
        if levels > heads.num_heads:
            raise ValueError(
                f"tree has {levels} levels, but there are {heads.num_heads} Medusa heads; "
                f"draft at most that many levels"
            )
        self.heads = heads
        self.shape = shape
        self.coupled = coupled
        self.nodes = shape.num_nodes - 1 if shape is not None else nodes
        self.max_nodes = 1 + self.nodes
        self.max_depth = levels
        self._features = LastFeatures()
        device = heads.lm_head(0).device
        self._graphs = DraftGraphs(device)
        self.known = known if shape is not None else known_of_grown(known, device)

    def ladder(self) -> Sequence[Budget]:
        if self.shape is None:
            return ladder(self.nodes, self.max_depth)
        return self.shape.ladder(self.max_depth)

    @torch.inference_mode()
    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        shape = None if self.shape is None else self.shape.within(budget)
        levels = shape.depth if shape is not None else min(budget.levels, self.max_depth)
        nodes = min(budget.nodes, self.nodes)

        def write(ground: Ground, more: Tensors) -> Sequence[torch.Tensor]:
            (features,) = more
            if shape is not None:
                drawn = self._draw(ground, features, levels, max(shape.widths))
                return (tree_of_offsets(ground.roots, drawn, shape),)
            grown = self._grow(ground, features, levels, nodes)
            return drafted_of(grown, judge)

        # A given target's head may be exchanged.
        key = (shape or (levels, nodes, judge is None), self.heads.lm_head(0).data_ptr())
        features = self._features.of(batch)[:, -1]
        drafted = self._graphs.run(key, batch, (features,), write)
        if shape is not None:
            return DraftTree.of_shape(shape, *drafted)
        return drafted_tree(drafted, levels, batch, judge)

    def _grow(self, ground: Ground, features: torch.Tensor, levels: int, nodes: int) -> GrownTree:
        """The ``nodes`` tokens that the heads are surest of."""
        width = min(self.GROWN_WIDTH, nodes)
        if levels == 1 or width == 1:
            nodes = min(nodes, width * levels)
        size, device = len(ground.roots), ground.roots.device
        scores = torch.empty((size, levels, width), dtype=torch.float32, device=device)
        drawn = self._draw(ground, features, levels, width, scores)
        return kernels.grow_offsets(ground.roots, drawn, scores, 1 + nodes)

    def _draw(
        self,
        ground: Ground,
        features: torch.Tensor,
        levels: int,
        count: int,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The best ``count`` tokens of each depth, [B, levels, count], and their scores.

        ``features``: [B, H], the hidden states that chose the roots.
        """
        tokens = ground.roots.to(torch.int64) if self.heads.reads_token else None
        logits = self.heads.logits(features, tokens, levels)
        ahead = torch.arange(1, levels + 1, device=ground.roots.device)
        return kernels.sample(
            logits,
            ground.seq_lens.to(torch.int64)[:, None] + ahead,
            ground.sampling,
            purpose=PURPOSE_TOKEN if self.coupled else PURPOSE_DRAFT,
            num_samples=count,
            allowed_vocab=ground.allowed_vocab,
            scores=scores,
        )

    def prefill(self, reading: Reading, output: ForwardOutput) -> None:
        assert output.features is not None
        self._features.start(reading, output.features)

    def commit(self, batch: Batch, walk: Walk) -> None:
        self._features.advance(batch, walk)

    def release(self, request: Request) -> None:
        self._features.release(request)

    def describe(self) -> dict[str, Any]:
        grown = {"grown": True, "depth": self.max_depth, "nodes": self.nodes}
        return {
            "drafter": self.name,
            "heads": self.heads.num_heads,
            "tree": grown if self.shape is None else describe_shape(self.shape),
            "coupled_noise": self.coupled,
        }


def plan(request: DraftRequest) -> DrafterPlan:
    """Trained Medusa heads."""
    config = request.config
    name = config.medusa.model
    with request.plain_target() as model:
        heads = load_medusa(
            name,
            model,
            allow_pickle=config.allow_pickle,
            known_ids=request.target.tokenizer_vocab_size,
        )
    depth = min(request.max_levels, heads.num_heads)
    shape = None if request.grows else request.shape("grown", depth, name)
    known = request.known(shape, name, depth)
    return DrafterPlan(
        lambda _: MedusaDrafter(
            heads,
            shape,
            nodes=config.nodes,
            depth=depth,
            coupled=config.coupled_noise,
            known=known,
        ),
        model=name,
    )
