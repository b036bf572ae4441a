"""How many tokens a target forward yields with a student, by letting the engine decode with it.

The student is read from its folder, as it will be where it serves; so what is measured is what is
served: the same steps, the same noise, the same trees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferlab.config import SpecdecConfig
from inferlab.models import HFModel
from inferlab.specdec.control import StepObservation
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.specdec.tree import ASSUMED_ACCEPTANCE, TreeShape
from inferlab.training.measure.rates import acceptance_rates
from inferlab.types import SamplingParams, SpeculationStats

GROWN_WIDTH = 8  # nodes that EAGLE's grown trees expand per level, and children of each
TREE_SLOTS = 256  # behind each text, for the largest trees


@dataclass(frozen=True)
class Chains:
    """What became of drafted chains.

    Attributes:
        by_position: share of the tokens that are right, given that those before were; 0 where none
            before were.
        length: mean tokens per step, the bonus token included.
    """

    by_position: tuple[float, ...]
    length: float


class ChainCounter(FixedController):
    """Drafts chains of one length and counts at which positions a token was right.

    A position counts where it was drafted and those before it were right: near the end of a text
    chains are shorter.
    """

    def __init__(self, levels: int) -> None:
        super().__init__(levels)
        self._right, self._judged = [0] * levels, [0] * levels

    def observe(self, step: StepObservation) -> None:
        for accepted, depth in zip(step.accepted, step.depths, strict=True):
            for position in range(min(len(accepted) + 1, depth)):
                self._judged[position] += 1
                self._right[position] += position < len(accepted)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each position's judged tokens that are right; 0 where none was judged."""
        counts = zip(self._right, self._judged, strict=True)
        return tuple(right / judged if judged else 0.0 for right, judged in counts)


class Trial:
    """A student beside its target, and the prompts that it is tried on.

    Args:
        target: loaded.
        mode: draft mode of the student: vanilla, medusa or eagle.
        folder: its finished files.
        prompts: token ids; each is continued with a seed of its own.
        new_tokens: behind each prompt, or what the target's context has room for.
        temperature: that target and student decode at.
    """

    def __init__(
        self,
        target: HFModel,
        mode: str,
        folder: Path,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: int,
        temperature: float = 0.0,
    ) -> None:
        length = max(map(len, prompts)) + new_tokens
        if target.context_length is not None and length > target.context_length:
            new_tokens -= length - target.context_length
        pages = -(-(length + TREE_SLOTS) // SpecdecConfig().page_size)
        draft = None
        if mode == "vanilla":
            draft = HFModel.load(folder, device=target.device, dtype=target.dtype)
        self._models: dict[str, Any] = {"target": target, "draft": draft}
        self._config = SpecdecConfig.model_validate(
            {
                "draft_mode": mode,
                "medusa": {"model": str(folder)},
                "eagle": {"model": str(folder)},
                "tree_width": GROWN_WIDTH,
                "temperature": temperature,
                "max_new_tokens": new_tokens,
                "max_batch": len(prompts),
                "num_pages": len(prompts) * pages,
            }
        )
        self._requests = [
            (
                prompt,
                SamplingParams(
                    max_tokens=new_tokens, temperature=temperature, seed=seed, ignore_eos=True
                ),
            )
            for seed, prompt in enumerate(prompts)
        ]

    def chains(self, levels: int) -> Chains:
        """With chains of so many tokens."""
        counter = ChainCounter(levels)
        found = self._decode(controller=counter, max_draft=levels, tree="chain")
        return Chains(counter.shares, found.mean_accepted_length)

    def rates(self, levels: int, nodes: int) -> list[list[float]]:
        """Acceptance by depth and rank, as far as the best static tree of so many levels and nodes
        below the root may need it; empty: the prompts were too few."""
        # A tree twice as large counts the ranks that may get into the best one.
        config = self._config.model_copy(update={"max_draft": levels})
        prompts = [prompt for prompt, _ in self._requests]
        return acceptance_rates(config, prompts, nodes=2 * nodes, **self._models)

    def static(self, rates: list[list[float]], levels: int, nodes: int) -> float:
        """Mean length with the best static tree of so many levels and nodes by these rates."""
        best = TreeShape.best(rates or [list(ASSUMED_ACCEPTANCE)], nodes, levels)
        return self._decode(best, max_draft=levels).mean_accepted_length

    def grown(self, levels: int, nodes: int) -> float:
        """Mean length with trees that grow to where the student is sure (medusa, eagle)."""
        found = self._decode(max_draft=levels, tree="grown", tree_nodes=nodes)
        return found.mean_accepted_length

    def _decode(
        self,
        shape: TreeShape | None = None,
        controller: FixedController | None = None,
        **changes: Any,
    ) -> SpeculationStats:
        pipeline = SpeculativePipeline(
            config=self._config.model_copy(update=changes),
            controller=controller,
            shape=shape,
            **self._models,
        )
        total = SpeculationStats()
        for result in pipeline.engine.generate(self._requests):
            total.add(result.stats)
        return total
