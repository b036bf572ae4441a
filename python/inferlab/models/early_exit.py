"""The first layers of a target as a model of their own: a draft model for free."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from inferlab.models.base import TargetModel
from inferlab.models.hf import HFModel
from inferlab.models.quantized import num_parameters


class EarlyExit(HFModel):
    """The first ``layers`` layers of a target, then its final norm and head.

    All weights are the target's own tensors. A target trained for it (LayerSkip: Elhoushi et al.,
    2024) makes good drafts after few of its layers; others may need most of them.

    Args:
        target: a model with weights.
        layers: how many layers, fewer than the target has; None: a quarter of them.

    Raises:
        ValueError: a target without layers (FakeLM), whose layers cannot be found, or that does
            not have so many.
    """

    def __init__(self, target: TargetModel, layers: int | None) -> None:
        if not isinstance(target, HFModel):
            raise ValueError(
                f"{target.name} has no layers to leave early; drafting with the target's first "
                "layers needs a real model (implementation='hf')"
            )
        count = len(target.layers)
        layers = max(count // 4, 1) if layers is None else layers
        if not 1 <= layers < count:
            raise ValueError(
                f"early exit layers is {layers}; {target.name} has {count} layers, so it must be "
                f"from 1 to {count - 1}"
            )
        # Everything but the depth is the target's.
        self.__dict__.update(target.__dict__)
        self._target = target
        self._count = layers
        self._build()
        self.name = f"{target.name}, first {layers} of {count} layers"
        self.num_parameters = num_parameters(self._model)
        self.load_notes = ()

    def _build(self) -> None:
        """From what was built for the target."""
        target = self._target
        self._model = _shallow(target.model, target._decoder_layers(), self._count)
        self._plan = replace(
            target._plan,
            layers=target.layers[: self._count],
            devices=target._plan.devices[: self._count],
        )
        if target._plan.decoder is not None:
            self._plan = replace(self._plan, decoder=self._model.get_decoder())
        self._fused = target._fused.first(self._count) if target._fused is not None else None
        self._can_pack = target._can_pack
        self._graphs = self._new_graphs()
        self._head, self._rotary = target._head, target._rotary
        self.context_length = target.context_length
        self._seen = target._seen

    def notice_changes(self) -> None:
        """See `HFModel`."""
        with self._lock:
            self._target.notice_changes()
            if self._seen is not self._target._seen:
                self._build()

    def rebuild(self) -> None:
        """See `HFModel`."""
        with self._lock:
            self._target.rebuild()
            self._build()

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """See `HFModel.plain`; the target cannot run meanwhile either, as they share the layers."""
        with self._target.plain():
            yield self._model


def _shallow(module: torch.nn.Module, stack: torch.nn.ModuleList, count: int) -> Any:
    """The module with only the first layers of ``stack`` inside; all else is shared."""
    if module is stack:
        return torch.nn.ModuleList(stack[:count])
    shallow = copy.copy(module)
    shallow._modules = {
        name: _shallow(child, stack, count)
        if child is not None and any(part is stack for part in child.modules())
        else child
        for name, child in module._modules.items()
    }
    return shallow
