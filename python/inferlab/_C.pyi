"""The compiled module. Arguments are positional; the typed wrappers are in inferlab.kernels."""

from typing import Any

def __getattr__(name: str) -> Any: ...
