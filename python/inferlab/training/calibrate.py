"""Measures which draft tokens are accepted, for `--tree optimal`.

Decodes prompts with a tree as large as trees get and counts, by depth, how often the r-th best
draft token was the one that the target chose. The rates go into `acceptance.json` beside the
draft's weights, where optimal trees find them.
"""

from __future__ import annotations

from inferlab.config import MAX_TREE_NODES, SpecdecConfig
from inferlab.specdec.calibration import AcceptanceCounts
from inferlab.specdec.controllers import FixedController, StepObservation
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


def calibrate(config: SpecdecConfig, prompts: list[str]) -> list[list[float]]:
    """Acceptance by depth and rank of the drafter that ``config`` names, on these prompts.

    Raises:
        ValueError: a draft mode whose trees are not made from it.
    """
    if config.draft_mode not in MODES:
        raise ValueError(
            f"draft_mode is {config.draft_mode!r}; only the trees of {', '.join(MODES)} are made "
            "from measured acceptance"
        )
    shape = TreeShape.best([list(ASSUMED_ACCEPTANCE)], MAX_TREE_NODES - 1, config.levels)
    controller = CountingController(shape)
    SpeculativePipeline(
        config=config.model_copy(update={"tree": None}), controller=controller, shape=shape
    ).generate(prompts)
    return controller.counts.rates()
