"""Registration of ops with torch.library, so that torch.compile takes each one whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

LIBRARY = torch.library.Library("inferlab", "FRAGMENT")

# is_compiling() is constant-folded by Dynamo: the eager path never pays for the dispatcher.
is_compiling = torch.compiler.is_compiling


def register(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines `inferlab::<schema>` with one implementation for all devices and its shape rule."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"inferlab::{name}", fake, lib=LIBRARY)


def is_numpy(value: object) -> bool:
    return isinstance(value, np.ndarray)


def as_tensor(value: Any) -> torch.Tensor:
    """A torch view of a NumPy array; tensors pass unchanged."""
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
