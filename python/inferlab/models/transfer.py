"""Host to device without waiting: a plain ``.to("cuda")`` stalls until the device has caught up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def upload(values: Sequence[Any] | np.ndarray, dtype: Any, device: torch.device) -> torch.Tensor:
    """Host values as a tensor on ``device``; the copy is queued on the current stream.

    Args:
        values: numbers, nested or not, or an array.
        dtype: a NumPy dtype.
    """
    host = torch.from_numpy(np.array(values, dtype=dtype))
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def upload_pages(pages: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Page ids of each row as a block table, [rows, max_pages] int32, -1 behind a row's own."""
    table = np.full((len(pages), max(map(len, pages))), -1, dtype=np.int32)
    for row, own in zip(table, pages, strict=True):
        row[: len(own)] = own
    return upload(table, np.int32, device)
