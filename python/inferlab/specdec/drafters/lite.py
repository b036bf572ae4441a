"""Medusa and EAGLE without training, as they are often imitated: here to be seen to be poor.

`medusa-lite` guesses every offset from the last hidden state by the target's own output head, which
knows the next token only. `eagle-lite` continues the last two hidden states on a straight line.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import abstractmethod
from typing import Any

import torch

from inferlab import kernels
from inferlab.config import MAX_DRAFT
from inferlab.models import FINAL_HIDDEN, ForwardOutput, TargetModel
from inferlab.scheduler import Request
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.features import LastFeatures
from inferlab.specdec.drafters.plan import DrafterPlan, DraftRequest
from inferlab.specdec.reading import Reading
from inferlab.specdec.tree import Budget, DraftTree, TreeShape
from inferlab.specdec.walk import Walk
from inferlab.types import check

HEAD_INITS = ("tie", "copy", "random")


class _LiteDrafter(Drafter):
    """A chain drafted from the target's last hidden states, by its output head."""

    feature_layers = (FINAL_HIDDEN,)
    hears_all = True

    def __init__(self, target: TargetModel, depth: int, states: int) -> None:
        if target.head is None:
            raise ValueError(
                f"{target.name} has no hidden states, which {self.name} drafts from; it needs a "
                "real model (implementation='hf')"
            )
        self.head: Any = target.head
        self.max_depth = depth
        self.max_nodes = 1 + depth
        self._features = LastFeatures(states)

    @abstractmethod
    def _logits(self, states: torch.Tensor, levels: int) -> torch.Tensor:
        """Hidden states [B, count, H], newest last, to logits [B, levels, V]."""

    @torch.inference_mode()
    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        levels = min(budget.levels, budget.nodes, self.max_depth)
        logits = self._logits(self._features.of(batch), levels)
        ahead = torch.arange(1, levels + 1, device=batch.device)
        positions = batch.seq_lens.to(torch.int64)[:, None] + ahead
        drawn = kernels.sample(
            logits, positions, self._sampling(batch), allowed_vocab=batch.allowed_vocab
        )
        tokens = torch.cat((batch.roots[:, None], drawn[:, :, 0].clamp_min(0)), dim=1)
        return DraftTree.of_shape(TreeShape.chain(levels), tokens)

    def _sampling(self, batch: Batch) -> kernels.SamplingTensors:
        return batch.sampling

    def prefill(self, reading: Reading, output: ForwardOutput) -> None:
        assert output.features is not None
        self._features.start(reading, output.features)

    def commit(self, batch: Batch, walk: Walk) -> None:
        self._features.advance(batch, walk)

    def release(self, request: Request) -> None:
        self._features.release(request)


class MedusaLiteDrafter(_LiteDrafter):
    """Untrained heads, one per offset, on the last hidden state.

    Args:
        target: a model with weights.
        num_heads: tokens to draft at most.
        head_init: "tie": the target's output head; "copy": a copy of it for each offset, which says
            the same; "random": random weights.
        temperature, top_p: of the draft's draws where the request samples at all; a greedy one is
            drafted for greedily.
        seed: of the random weights.

    Raises:
        ValueError: a target without hidden states (FakeLM), or a value that is not allowed.
    """

    name = "medusa-lite"

    def __init__(
        self,
        target: TargetModel,
        num_heads: int = 2,
        head_init: str = "tie",
        temperature: float = 0.7,
        top_p: float = 1.0,
        *,
        seed: int = 0,
    ) -> None:
        check("num_heads", num_heads, 1 <= num_heads <= MAX_DRAFT, f"from 1 to {MAX_DRAFT}")
        check("head_init", head_init, head_init in HEAD_INITS, f"one of {', '.join(HEAD_INITS)}")
        check("temperature", temperature, temperature >= 0, "a number >= 0")
        check("top_p", top_p, 0 < top_p <= 1, "in (0, 1]")
        super().__init__(target, num_heads, states=1)
        self.head_init = head_init
        self.temperature = temperature
        self.top_p = top_p
        self.heads = [self.head] * num_heads
        if head_init != "tie":
            self.heads = [copy.deepcopy(self.head) for _ in range(num_heads)]
        if head_init == "random":
            generator = torch.Generator().manual_seed(seed)
            for head in self.heads:
                weight = torch.randn(head.weight.shape, generator=generator) * 0.02
                head.weight = torch.nn.Parameter(weight.to(head.weight), requires_grad=False)

    def _logits(self, states: torch.Tensor, levels: int) -> torch.Tensor:
        return torch.stack([head(states[:, -1]) for head in self.heads[:levels]], dim=1)

    def _sampling(self, batch: Batch) -> kernels.SamplingTensors:
        given = batch.sampling
        return dataclasses.replace(
            given,
            temperature=given.temperature.sign() * self.temperature,
            top_p=torch.full_like(given.top_p, self.top_p),
        )

    def describe(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "heads": len(self.heads),
            "head_init": self.head_init,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }


class EagleLiteDrafter(_LiteDrafter):
    """Hidden states on a straight line: h[t+1] = h[t] + alpha * (h[t] - h[t-1]), and so on.

    Args:
        target: a model with weights.
        alpha: how far each step goes, relative to the one before.
        max_draft: tokens to draft at most.

    Raises:
        ValueError: a target without hidden states (FakeLM), or a value that is not allowed.
    """

    name = "eagle-lite"

    def __init__(self, target: TargetModel, alpha: float = 0.7, max_draft: int = 2) -> None:
        check("alpha", alpha, 0 <= alpha <= 1, "in [0, 1]")
        check("max_draft", max_draft, 1 <= max_draft <= MAX_DRAFT, f"from 1 to {MAX_DRAFT}")
        super().__init__(target, max_draft, states=2)
        self.alpha = alpha

    def _logits(self, states: torch.Tensor, levels: int) -> torch.Tensor:
        before, newest = states[:, -2], states[:, -1]
        line = []
        for _ in range(levels):
            before, newest = newest, newest + self.alpha * (newest - before)
            line.append(newest)
        logits: torch.Tensor = self.head(torch.stack(line, dim=1))
        return logits

    def describe(self) -> dict[str, Any]:
        return {"drafter": self.name, "alpha": self.alpha, "max_draft": self.max_depth}


def plan_medusa(request: DraftRequest) -> DrafterPlan:
    """Untrained heads."""
    lite = request.config.medusa
    return DrafterPlan(
        lambda _: MedusaLiteDrafter(
            request.target,
            lite.num_heads,
            lite.head_init,
            lite.temperature,
            lite.top_p,
            seed=request.config.seed,
        )
    )


def plan_eagle(request: DraftRequest) -> DrafterPlan:
    """Hidden states on a straight line."""
    lite = request.config.eagle
    levels = max(lite.max_draft, 1)
    return DrafterPlan(lambda _: EagleLiteDrafter(request.target, lite.alpha, levels))
