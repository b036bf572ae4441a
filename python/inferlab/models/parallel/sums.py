"""Sums over ranks in the order of the ranks, so that a row's bits do not depend on its company.

The usual all-reduce goes around a ring: which rank's part comes first hangs on where in the message
an element lies, and so, with more than two ranks, on how many rows there are. Here every element is
the sum of rank 0's part, rank 1's, and so on, whoever adds it up, in float32 or better.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.tensor import Replicate
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    AllReduceParallel,
    MoeExpertsParallel,
    RowwiseParallel,
)

GATHERED_BYTES = 1 << 18
"""Messages up to this size go to all ranks whole, which is one exchange in place of two."""


# Torch 2.13 renames it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def ordered_sum(part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum of all ranks' ``part`` (of one shape and dtype), the same bits on every rank.

    Bytes received, of n ranks: n times a small part; of a large one, of which each rank adds up a
    share, 2 (n - 1) / n times.
    """
    size = dist.get_world_size(group)
    flat = part.contiguous().view(-1)
    if flat.numel() * flat.element_size() <= GATHERED_BYTES:
        parts = flat.new_empty(size * flat.numel())
        _all_gather(parts, flat, group=group)
        return _added_up(parts.view(size, -1)).view_as(part)
    count = flat.numel()
    flat = torch.nn.functional.pad(flat, (0, -count % size))
    shares = torch.empty_like(flat)
    dist.all_to_all_single(shares, flat, group=group)
    total = torch.empty_like(flat)
    _all_gather(total, _added_up(shares.view(size, -1)), group=group)
    return total[:count].view_as(part)


def _added_up(parts: torch.Tensor) -> torch.Tensor:
    """[ranks, n] -> [n], row by row."""
    wide = torch.promote_types(parts.dtype, torch.float32)
    total = parts[0].to(wide)
    for other in parts[1:]:
        total = total + other
    return total.to(parts.dtype)


def _group(mesh: Any) -> dist.ProcessGroup:
    group: dist.ProcessGroup = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
    return group


class OrderedRowwise(RowwiseParallel):  # type: ignore[misc]
    """A linear layer whose inputs are shared out; its outputs are `ordered_sum`'s."""

    def transform_output_post_forward(self, module: Any, output: Any, mesh: Any) -> Any:
        total = ordered_sum(output, _group(mesh))
        bias = module._parameters.get("bias")
        if bias is None:
            return total
        return total + (bias.to_local() if hasattr(bias, "to_local") else bias)


class OrderedExperts(MoeExpertsParallel):  # type: ignore[misc]
    """Experts of which each rank has a part."""

    def transform_output_post_forward(self, module: Any, output: Any, mesh: Any) -> Any:
        return None if output is None else ordered_sum(output, _group(mesh))


class OrderedAllReduce(AllReduceParallel):  # type: ignore[misc]
    """Any module of whose output each rank has a part."""

    def transform_output_post_forward(self, module: Any, output: Any, mesh: Any) -> Any:
        return None if output is None else ordered_sum(output, _group(mesh))


ORDERED = {
    "rowwise": OrderedRowwise(),
    "rowwise_rep": OrderedRowwise(),
    "rowwise_split_input": OrderedRowwise(input_layouts=Replicate()),
    "moe_tp_experts": OrderedExperts(),
    "all_reduce": OrderedAllReduce(),
}
"""By transformers' style, the one in its place. Sums of embeddings, of which one rank alone has a
part that is not zero, are right as they are."""
PREFIX = "inferlab_"

for _name, _style in ORDERED.items():
    ALL_PARALLEL_STYLES.register(PREFIX + _name, _style)
