"""Weights in memory of their own: files are mapped, and what is read of them stays resident beside
what is made of it (joint products, packed weights) for as long as one weight of the file is used.
"""

from __future__ import annotations

import torch
from torch import nn

from inferlab import _C
from inferlab.models.untouched import is_plain


def unmap(model: nn.Module) -> None:
    """Copies weights that lie in a mapped file, one after the other, and gives back the memory that
    the file's took: never more than one weight is there twice.

    Args:
        model: that nobody else has seen yet; other views of its weights would lose what was written
            to them since they were read.
    """
    copies: dict[tuple[object, ...], torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_plain(tensor) or tensor.device.type != "cpu" or tensor.numel() == 0:
            continue
        mapped = tensor.data
        if mapped.untyped_storage().resizable() or not mapped.is_contiguous():
            continue  # torch's own memory, or a view of other weights
        key = mapped.data_ptr(), mapped.dtype, mapped.shape
        if key not in copies:
            copies[key] = mapped.clone()
            _C.discard_pages(mapped.view(-1).view(torch.uint8))
        tensor.data = copies[key]
