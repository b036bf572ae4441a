"""The ops on Apple GPUs: `_C.metal` checks the arguments and says what to launch, and the kernels
run on torch's MPS stream. Matrix products (`linear`) are torch's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from inferlab import _C
from inferlab.kernels.metal.shaders import Shaders


class MetalOps:
    """`_C`'s op functions as attributes. Shaders are compiled when they are first used."""

    def __init__(self, shaders: Shaders | None = None) -> None:
        self.shaders = shaders or Shaders()
        for name, op in vars(_C.metal).items():
            if callable(op):
                setattr(self, name, partial(op, self.shaders.run))

    def __getattr__(self, name: str) -> Any:  # for the type checker: attributes are set above
        raise AttributeError(f"inferlab has no op {name!r}")
