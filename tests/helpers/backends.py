"""Where the device tests run an op: a real GPU, or its kernels on the CPU through a shim."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings

from inferlab.kernels import _registry


@dataclass(frozen=True)
class Backend:
    """Attributes:
    name: cuda, cuda-shim, mps, metal-shim or fallback.
    device: where tensors go; "cpu" for a shim.
    ops: what a shim puts in the place of the CPU's ops; None on a real device.
    """

    name: str
    device: str
    ops: Any = None

    @property
    def is_metal(self) -> bool:
        return self.name in ("mps", "metal-shim")

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, `inferlab.kernels` runs tensors of `device` here."""
        if self.ops is None:
            yield
            return
        cpu_ops = _registry.BACKENDS["cpu"]
        _registry.BACKENDS["cpu"] = self.ops
        try:
            yield
        finally:
            _registry.BACKENDS["cpu"] = cpu_ops

    def to(self, value: Any) -> Any:
        """A copy on the device, of tensors and of tuples, dicts and sampling parameters of them."""
        return _each(value, lambda t: t.clone() if self.ops is not None else t.to(self.device))

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """op(...) on the device; the result on the CPU. Arguments are copied, never written to."""
        with self.active():
            result = op(*map(self.to, args), **{k: self.to(v) for k, v in kwargs.items()})
        return _each(result, lambda t: t.cpu())

    def call_in_place(self, op: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """op(...) for what it does to its arguments: they come back, on the CPU."""
        moved = [self.to(a) for a in args]
        with self.active():
            op(*moved, **{k: self.to(v) for k, v in kwargs.items()})
        return [_each(a, lambda t: t.cpu()) for a in moved]


def random_examples(count: int) -> settings:
    """Settings of a device test: the same examples in every run, all on one backend."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


def _each(value: Any, fn: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # Strides matter to some tests; clone and to keep those of dense tensors only.
        moved = fn(value)
        return moved if moved.stride() == value.stride() else _with_strides(moved, value)
    if hasattr(value, "flat") and hasattr(value, "uses_context"):
        return type(value)(*(_each(t, fn) for t in value.flat))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each(v, fn) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_each(v, fn) for v in value)
    return value


def _with_strides(moved: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    extent = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    storage = torch.zeros(max(extent, 0), dtype=moved.dtype, device=moved.device)
    view = storage.as_strided(like.shape, like.stride())
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in like.stride())
    view[once].copy_(moved[once])  # what an expanded tensor holds once is written once
    return view
