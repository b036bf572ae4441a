"""Whether a module still does what its class was written to do, and whether it changed since.

A path that knows a forward may stand in for modules only while they have exactly that forward, as
the module in which their class stands wrote it, all the way down: no hooks (on the module or on all
modules of the process), no replaced `forward` or call, neither on the module nor on its class, and
weights that can be read. What such a path took from the modules when it was built (sizes, scales,
epsilons, windows, addresses) is in a `Snapshot`, which is compared before each new text.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig

_CALLS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
_OF_A_FUNCTION = ("__code__", "__wrapped__")
_LIBRARIES = ("torch", "transformers")  # whose wrappers around a forward leave its results alone
_TORCHS_OWN = frozenset(vars(nn.Module())) - {"training"}
_WATCHED = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_CONTAINERS = (dict, list, tuple)

# Functions beside the classes of a family, which their forwards call.
HELPERS = ("apply_rotary_pos_emb", "rotate_half")


def is_untouched(module: nn.Module) -> bool:
    """Whether calling this module, not those below it, runs the forward of its class and nothing
    else."""
    return not _all_are_watched() and _runs_its_class(module) and is_as_written(type(module))


def is_as_written(kind: type) -> bool:
    """Whether the forward of a class, and how it is called, are those of its own source.

    Wrappers count as changes, `functools.wraps` or not, but for torch's and transformers' own.
    """
    for name in _CALLS:
        base = next((base for base in kind.__mro__ if name in vars(base)), None)
        if base is None or not is_own_function(vars(base)[name], base.__module__):
            return False
        qualified = f"{base.__qualname__}.forward"
        if name == "forward" and base is not nn.Module and _name(vars(base)[name]) != qualified:
            return False
    return True


def is_own_function(function: Any, module: str) -> bool:
    """Whether the code of a function, inside the wrappers of libraries, was written in ``module``.

    What `functools.wraps` copies (``__module__``, ``__qualname__``) says nothing; the globals of
    the code do.
    """
    while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
        if _written_in(function).partition(".")[0] not in _LIBRARIES:
            return False
        function = function.__wrapped__
    return isinstance(function, FunctionType) and _written_in(function) == module


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight's numbers are what they seem to be: no tensor of a kind of its own."""
    return type(weight) in (torch.Tensor, nn.Parameter)


def has_weights(model: nn.Module) -> bool:
    """Whether all of a model's weights are there as plain numbers, on one device, in one dtype."""
    kinds = {(p.device, p.dtype) for p in model.parameters()}
    plain = all(map(is_plain, model.parameters()))
    return plain and len(kinds) == 1 and next(iter(kinds))[0].type != "meta"


class Snapshot:
    """A model as it is now, to be compared with before each new text: in microseconds, since steps
    of a small model take but some hundred of them.

    A module is its attributes, so what is compared are dictionaries with their copies. What a
    snapshot knows of a model lives as long as the snapshot.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._types = list(map(type, self._modules))
        self._classes = self._facts_of_classes()
        owners: dict[int, Any] = {id(module): module for module in self._modules}
        for module in self._modules:
            configs = (each for each in vars(module).values() if isinstance(each, PreTrainedConfig))
            owners |= {id(config): config for config in configs}
        self._owned = [(owner, vars(owner)) for owner in owners.values()]
        self._live = [table for _, table in self._owned]
        self._live += (vars(module)[name] for module in self._modules for name in _WATCHED)
        self._copies = [dict(table) for table in self._live]
        # What equal dictionaries hold may be equal and still another, which only of a tuple is no
        # change, or change in place.
        inner = [
            (table, name, value)
            for table in self._live
            for name, value in table.items()
            if isinstance(value, (*_CONTAINERS, torch.Tensor, PreTrainedConfig))
            and name not in _TORCHS_OWN
        ]
        self._inner = [each for each in inner if not isinstance(each[2], tuple)]
        self._tensors = [tensor for _, _, value in inner for tensor in _tensors_in(value)]
        self._places = list(map(_place, self._tensors))
        self._containers = [value for _, _, value in inner if isinstance(value, _CONTAINERS)]
        self._contents = list(map(_copied, self._containers))

    def holds(self) -> bool:
        """Whether no module of the model was exchanged, hooked or given another forward, none of
        its attributes or of its configuration's was set to something else, and no weight has moved;
        values of weights may have changed."""
        try:
            return (
                all(vars(owner) is table for owner, table in self._owned)
                and self._live == self._copies
                and list(map(type, self._modules)) == self._types
                and self._facts_of_classes() == self._classes
                and all(table[name] is value for table, name, value in self._inner)
                and self._containers == self._contents
                and list(map(_place, self._tensors)) == self._places
            )
        except Exception:  # the equality of what was set there: of tensors it is no yes or no
            return False

    def _facts_of_classes(self) -> list[Any]:
        facts: list[Any] = [_all_are_watched()]
        for kind in dict.fromkeys(self._types):  # layers repeat
            calls = [getattr(kind, name) for name in _CALLS]
            inside = [getattr(calls[0], name, None) for name in _OF_A_FUNCTION]
            facts += map(_Same, (*calls, *inside))
            written_in = vars(sys.modules.get(kind.__module__, object))
            facts += [_Same(written_in.get(name)) for name in HELPERS]
        return facts


def _all_are_watched() -> bool:
    """Whether hooks are set on all modules of the process."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def _runs_its_class(module: nn.Module) -> bool:
    own = vars(module)
    replaced = not own.keys().isdisjoint(_CALLS) or module._compiled_call_impl is not None
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or replaced)


def _written_in(function: FunctionType) -> str:
    return str(function.__globals__.get("__name__"))


def _name(function: Any) -> str:
    """The qualified name with which the innermost function was written."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    code = function.__code__
    return str(getattr(code, "co_qualname", function.__qualname__))  # Python 3.10 has no such name


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    try:
        address: Any = None if tensor.is_meta else tensor.data_ptr()
    except RuntimeError:  # a tensor without a storage of its own
        address = _Same(tensor)
    return address, tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, _CONTAINERS):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each)


def _copied(value: Any) -> Any:
    """The containers copied, with the same things in them."""
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list):
        return list(map(_copied, value))
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value


class _Same:
    """Equal to itself and to no copy; keeps the object, so that no other takes its address."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)
