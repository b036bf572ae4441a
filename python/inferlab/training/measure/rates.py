"""Which of a node's children is accepted, counted while the engine decodes with all of a tree."""

from __future__ import annotations

from collections.abc import Sequence

from inferlab.config import MAX_TREE_NODES, SpecdecConfig
from inferlab.models import TargetModel
from inferlab.specdec.calibration import AcceptanceCounts
from inferlab.specdec.control import StepObservation
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.specdec.tree import ASSUMED_ACCEPTANCE, TreeShape

MODES = ("vanilla", "medusa", "eagle")
"""Draft modes whose static trees take a node's r-th best token, with weights of their own."""


class CountingController(FixedController):
    """Drafts all of a tree in every step and counts which of its nodes are accepted."""

    def __init__(self, shape: TreeShape) -> None:
        super().__init__(shape.depth)
        self.counts = AcceptanceCounts(shape)
        self._shape = shape

    def observe(self, step: StepObservation) -> None:
        if step.budget.levels < self._shape.depth:
            return  # near the end of a text less is drafted
        for ranks, depth in zip(step.accepted, step.depths, strict=True):
            if depth == self._shape.depth:
                self.counts.add(ranks)


def acceptance_rates(
    config: SpecdecConfig,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    nodes: int = MAX_TREE_NODES - 1,
    target: TargetModel | None = None,
    draft: TargetModel | None = None,
) -> list[list[float]]:
    """Acceptance by depth and rank of the drafter that ``config`` names, on these prompts.

    Args:
        nodes: of the tree that is drafted in every step, below the root.
        target, draft: loaded models in place of those that ``config`` names.

    Raises:
        ValueError: a draft mode whose trees are not made from it.
    """
    if config.draft_mode not in MODES:
        raise ValueError(
            f"draft_mode is {config.draft_mode!r}; only the trees of {', '.join(MODES)} are made "
            "from measured acceptance"
        )
    shape = TreeShape.best([list(ASSUMED_ACCEPTANCE)], nodes, config.levels)
    controller = CountingController(shape)
    SpeculativePipeline(
        config=config.model_copy(update={"tree": None}),
        controller=controller,
        shape=shape,
        target=target,
        draft=draft,
    ).generate(prompts, seed=[config.seed + index for index in range(len(prompts))])
    return controller.counts.rates()
