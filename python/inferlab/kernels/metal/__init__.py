"""The ops on Apple GPUs: `_C`'s functions, run by Metal kernels on torch's MPS stream. Matrix
products (`linear`) are torch's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from inferlab.kernels.metal import attention, kv, layer, noise, sampling, tree
from inferlab.kernels.metal.shaders import Shaders

_OPS: tuple[Any, ...] = (
    tree.build_tree,
    kv.kv_append,
    kv.kv_compact,
    kv.kv_gather,
    kv.kv_copy_pages,
    attention.paged_tree_attention,
    attention.attention_workspace_bytes,
    sampling.sample,
    sampling.sample_workspace_bytes,
    sampling.verify_tree_match,
    sampling.verify_workspace_bytes,
    sampling.verify_tree_rejection,
    sampling.verify_tree_lossy,
    noise.gumbel_row,
    noise.philox4x32_10,
    layer.rms_norm,
    layer.silu_mul,
    layer.rope_append,
)


class MetalOps:
    """`_C`'s op functions as attributes. Shaders are compiled when they are first used."""

    def __init__(self, shaders: Shaders | None = None) -> None:
        self.shaders = shaders or Shaders()
        for op in _OPS:
            setattr(self, op.__name__, partial(op, self.shaders))

    def __getattr__(self, name: str) -> Any:  # for the type checker: attributes are set above
        raise AttributeError(f"inferlab has no Metal kernel {name!r}")
