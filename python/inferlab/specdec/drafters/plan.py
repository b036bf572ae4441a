"""What a drafter is made of: what was asked for, and how it is built from that."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from inferlab.config import SpecdecConfig
from inferlab.draft_modes import DRAFT_MODES
from inferlab.errors import UsageError
from inferlab.machine import launched_as
from inferlab.models import HFModel, ShardedModel, TargetModel, plain_model
from inferlab.specdec.acceptance import UNKNOWN, Known
from inferlab.specdec.calibration import measured_acceptance
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import ASSUMED_ACCEPTANCE, TreeShape

MEASURED = 60.0
"""Observations that rates which lie beside the weights are worth."""


@dataclass(frozen=True)
class DrafterPlan:
    """A drafter but for its K/V pages, whose number follows from what they weigh.

    Attributes:
        build: from the number of pages to a drafter of its own, every time.
        bytes_per_token: K/V of the draft, per token.
        model: what drafts, for results; None without weights of its own.
    """

    build: Callable[[int], Drafter]
    bytes_per_token: int = 0
    model: str | None = None


@dataclass(frozen=True)
class DraftRequest:
    """What a drafter is asked for.

    Attributes:
        max_levels: of a chain: the most that the controller may ask for.
        draft: a loaded draft model in place of ``config.draft_model``.
        given_shape: a static tree in place of ``config.tree``.
    """

    config: SpecdecConfig
    target: TargetModel
    policy: Policy
    max_levels: int
    draft: TargetModel | None = None
    given_shape: TreeShape | None = None

    def shape(self, default: str, depth: int, drafts: str) -> TreeShape:
        """The static tree asked for, at most ``depth`` levels. ``drafts``: what is accepted."""
        config = self.config
        if self.given_shape is not None:
            return self.given_shape
        tree = config.tree if config.tree is not None else default
        if isinstance(tree, tuple):
            return TreeShape.regular(tree)
        if tree == "chain":
            return TreeShape.chain(depth)
        acceptance = measured_acceptance(drafts) or [list(ASSUMED_ACCEPTANCE)]
        return TreeShape.best(acceptance, config.nodes, depth)

    def known(self, shape: TreeShape | None, drafts: str, depth: int | None = None) -> Known:
        """What was measured about the nodes of this tree, if it was; ``drafts`` and ``depth`` as
        above. None: of trees that are grown, whose n surest nodes are accepted as the n best of a
        static tree are, if not more often."""
        measured = measured_acceptance(drafts)
        if measured is None:
            return UNKNOWN
        if shape is None:
            best = TreeShape.best(measured, self.config.nodes, depth).chances(measured)
            return Known(by_rank=sorted(best, reverse=True), evidence=MEASURED)
        return Known(by_rank=shape.chances(measured), evidence=MEASURED)

    @property
    def grows(self) -> bool:
        """Whether trees are grown, by a drafter that can, and does unless told otherwise."""
        return self.config.tree in (None, "grown") and self.given_shape is None

    def plain_target(self) -> AbstractContextManager[Any]:
        """The Hugging Face model of the target, which must have hidden states."""
        return plain_model(self.target, f"draft_mode {self.config.draft_mode!r}")


def make_plan(request: DraftRequest) -> DrafterPlan:
    """By the function that the table names.

    Raises:
        ValueError: a mode that reads hidden states, for a target without any.
        UsageError: one that reads weights, for a target on several devices.
    """
    name = request.config.draft_mode
    mode = DRAFT_MODES[name]
    if mode.reads_hidden:
        plain_model(request.target, f"draft_mode {name!r}")
        if isinstance(request.target, HFModel) and request.target.is_spread:
            raise UsageError(
                f"draft_mode {name!r} reads weights of the target, which device_map puts on "
                "several devices; draft with vanilla, ngram or recycling, or share the target out "
                "by tensor_parallel"
            )
    module, function = mode.plan.split(":")
    make = getattr(import_module(f"inferlab.specdec.drafters.{module}"), function)
    plan: DrafterPlan = make(request)
    return plan


def load_target(config: SpecdecConfig) -> TargetModel:
    """The target, on one device or several."""
    ranks = config.tensor_parallel or launched_as()[1]
    if ranks > 1:
        return ShardedModel.load(
            config.base_model, ranks, kv_cache_dtype=config.kv_cache_dtype, **_conditions(config)
        )
    return load_model(
        config,
        config.base_model,
        config.quantization,
        device_map=config.device_map,
        kv_cache_dtype=config.kv_cache_dtype,
    )


def load_model(config: SpecdecConfig, name: str, quantization: str, **options: Any) -> HFModel:
    """A model on the device, in the dtype and under the conditions of the configuration.

    Args:
        options: others of `HFModel.load`.
    """
    return HFModel.load(
        name,
        **_conditions(config),
        quantization=None if quantization == "none" else quantization,
        engine=config.engine,
        **options,
    )


def _conditions(config: SpecdecConfig) -> dict[str, Any]:
    return {
        "device": config.requested_device,
        "dtype": config.dtype,
        "device_priority": config.device_priority,
        "max_memory_mb": config.max_memory_mb,
        "trust_remote_code": config.trust_remote_code,
        "allow_pickle": config.allow_pickle,
    }
