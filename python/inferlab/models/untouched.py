"""Whether a module still does what its class was written to do.

A path that knows a forward may stand in for modules only while they have exactly that forward: no
hooks (accelerate's offloading, steering vectors), no replaced `forward`, neither on the module nor
on its class, and weights that can be read.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def is_untouched(module: nn.Module) -> bool:
    """Whether calling this module, not those below it, runs the forward of its class and nothing
    else."""
    return _runs_its_class(module) and _is_own_forward(type(module))


def _runs_its_class(module: nn.Module) -> bool:
    watched = module._forward_hooks or module._forward_pre_hooks
    return not watched and "forward" not in vars(module)


def _is_own_forward(kind: type) -> bool:
    """Whether a class's forward is from the module in which the class that has it was written."""
    for base in kind.__mro__:
        forward = vars(base).get("forward")
        if forward is not None:
            return getattr(inspect.unwrap(forward), "__module__", None) == base.__module__
    return True


def has_weights(model: nn.Module) -> bool:
    """Whether all of a model's weights are there, on one device and in one dtype."""
    kinds = {(p.device, p.dtype) for p in model.parameters()}
    return len(kinds) == 1 and next(iter(kinds))[0].type != "meta"


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Changes when a module of the model is exchanged, hooked or given another forward, or when a
    weight moves; not when a weight's values change."""
    return tuple(_facts(model))


def _facts(model: nn.Module) -> Iterator[Any]:
    modules = list(model.modules())
    for kind in dict.fromkeys(map(type, modules)):  # layers repeat, and this is asked per prompt
        yield kind, _is_own_forward(kind)
    for module in modules:
        yield id(module), type(module), _runs_its_class(module)
        for parameter in module._parameters.values():
            yield None if parameter is None else _place(parameter)


def _place(parameter: torch.Tensor) -> tuple[Any, ...]:
    address = None if parameter.is_meta else parameter.data_ptr()
    return address, parameter.dtype, parameter.device
