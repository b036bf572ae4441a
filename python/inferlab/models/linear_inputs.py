"""What the linear modules of a model are given on some texts: second moments of their inputs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

PART_BYTES = 2**30
PART_MODULES = 8
"""Modules whose moments are kept at a time: about those of a layer. Those of a list, as experts
are, count as one."""


class Inputs:
    """Runs a model on texts while its linear modules are packed, part by part.

    Each part sees what those before it make of the texts once they are packed, so that later ones
    make up for their errors, too.

    Args:
        model: whose modules are exchanged meanwhile.
        texts: token ids, each text a forward.
    """

    def __init__(self, model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._texts = [torch.tensor([list(text)], dtype=torch.int64) for text in texts]

    def in_parts(self, modules: Sequence[nn.Module]) -> list[list[nn.Module]]:
        """In the order in which they run; those that do not, first."""
        ran: dict[nn.Module, None] = {}
        self._run(modules, lambda module, x: ran.setdefault(module), self._texts[:1])
        idle = [module for module in modules if module not in ran]
        lists = {
            module: each
            for each in self._model.modules()
            if isinstance(each, nn.ModuleList)
            for module in each
        }
        parts: list[list[nn.Module]] = []
        for some in (idle, list(ran)):
            size, counted = 0, set[nn.Module]()
            for module in some:
                needed, place = 4 * _width(module) ** 2, lists.get(module, module)
                full = len(counted) == PART_MODULES and place not in counted
                if not size or size + needed > PART_BYTES or full:
                    parts.append([])
                    size, counted = 0, set()
                parts[-1].append(module)
                counted.add(place)
                size += needed
        return parts

    def moments(self, modules: Sequence[nn.Module]) -> dict[nn.Module, torch.Tensor]:
        """[in, in] fp32 of each that runs: the sum of x x^T over all tokens.

        Raises:
            ValueError: it is not finite; names the module.
        """
        found: dict[nn.Module, torch.Tensor] = {}

        def add(module: nn.Module, x: torch.Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1]).float()
            if module not in found:
                found[module] = rows.new_zeros(rows.shape[1], rows.shape[1])
            found[module].addmm_(rows.t(), rows)

        self._run(modules, add, self._texts)
        names = {module: name for name, module in self._model.named_modules()}
        for module, moments in found.items():
            if not bool(moments.isfinite().all()):
                raise ValueError(
                    f"calibration: {names[module]} is given numbers on these texts that are not "
                    "finite, or too large; take another dtype, or leave calibration out"
                )
        return found

    @torch.inference_mode()
    def _run(
        self,
        modules: Sequence[nn.Module],
        see: Callable[[nn.Module, torch.Tensor], object],
        texts: Sequence[torch.Tensor],
    ) -> None:
        """``see(module, x)`` for each call. What lies behind the last one is not run, where the
        first text says which that is: each runs once (experts may not)."""
        calls: Counter[nn.Module] = Counter()
        last = 0

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            see(module, args[0])
            calls[module] += 1
            if len(calls) == last:
                raise _Enough

        handles = [module.register_forward_pre_hook(hook) for module in modules]
        try:
            for number, text in enumerate(texts):
                calls.clear()
                with contextlib.suppress(_Enough):
                    self._model(input_ids=text, use_cache=False)
                if number == 0 and list(calls.values()) == [1] * len(modules):
                    last = len(modules)
        finally:
            for handle in handles:
                handle.remove()


class _Enough(Exception):
    """All was seen."""


def _width(module: nn.Module) -> int:
    """Inputs of a linear module."""
    weight: Any = module.weight
    return int(weight.shape[1] if isinstance(module, nn.Linear) else weight.shape[0])
