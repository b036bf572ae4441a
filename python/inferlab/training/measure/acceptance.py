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
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.specdec.tree import ASSUMED_ACCEPTANCE, TreeShape
from inferlab.training.measure.rates import CountingController, acceptance_rates
from inferlab.types import SamplingParams, SpeculationStats

GROWN_WIDTH = 8  # nodes that EAGLE's grown trees expand per level, and children of each
TREE_SLOTS = 256  # behind each text, for the largest trees


@dataclass(frozen=True)
class Measured:
    """Acceptance on a set of prompts; lengths are tokens per step, the bonus token included.

    Attributes:
        by_position: share of a chain's tokens that are right, given that those before were.
        chain: mean length with chains of `len(by_position)`.
        tree: the same with the best static tree of `nodes` nodes.
        nodes: below the root.
    """

    by_position: tuple[float, ...]
    chain: float
    tree: float
    nodes: int


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

    def static(self, levels: int, nodes: int) -> Measured:
        """Chains of so many levels, and the best static tree of so many levels and nodes."""
        chain = TreeShape.chain(levels)
        counting = CountingController(chain)
        of_chain = self._decode(shape=chain, controller=counting)
        right = [rates[0] for rates in counting.counts.rates()]
        # A tree twice as large counts the ranks that may get into the best one.
        config = self._config.model_copy(update={"max_draft": levels})
        prompts = [prompt for prompt, _ in self._requests]
        rates = acceptance_rates(config, prompts, nodes=2 * nodes, **self._models)
        best = TreeShape.best(rates or [list(ASSUMED_ACCEPTANCE)], nodes, levels)
        of_tree = self._decode(shape=best, max_draft=levels)
        return Measured(
            tuple(right + [0.0] * (levels - len(right))),
            of_chain.mean_accepted_length,
            of_tree.mean_accepted_length,
            nodes,
        )

    def grown(self, levels: int, nodes: int) -> float:
        """Mean length with trees that grow to where the student is sure (medusa, eagle)."""
        found = self._decode(max_draft=levels, tree="grown", tree_nodes=nodes)
        return found.mean_accepted_length

    def _decode(
        self,
        shape: TreeShape | None = None,
        controller: CountingController | None = None,
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
