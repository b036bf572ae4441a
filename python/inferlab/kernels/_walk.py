"""What all verify_tree_* ops share: their result and their workspace."""

from __future__ import annotations

from typing import NamedTuple

import torch

from inferlab.kernels._registry import empty, new_workspace, ops_for
from inferlab.kernels.sampling_params import SamplingTensors


class VerifyResult(NamedTuple):
    """The walk of each sequence, root first; entries behind num_accepted are -1.

    Attributes:
        accepted_nodes: i32[B, N], the j-th node visited (0, the root, first).
        accepted_tokens: i32[B, N], the token emitted there: the entered child's, and at the last
            node the bonus token; -1 at a row that cannot be sampled from, where the walk ends.
        num_accepted: i32[B], entries: accepted draft tokens + 1.
    """

    accepted_nodes: torch.Tensor
    accepted_tokens: torch.Tensor
    num_accepted: torch.Tensor


def new_result(logits: torch.Tensor) -> VerifyResult:
    """Room for the result of logits [B, N, V]."""
    if logits.ndim != 3:
        raise ValueError(f"logits has shape {list(logits.shape)}; it must be [B, N, V]")
    batch, nodes, _ = logits.shape
    return VerifyResult(
        empty((batch, nodes), logits, torch.int32),
        empty((batch, nodes), logits, torch.int32),
        empty((batch,), logits, torch.int32),
    )


def verify_workspace(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor | None:
    """Scratch memory that serves the verifiers for these shapes; None where they need none.

    Its contents do not matter, before and after. To be given where the call may not allocate, or
    is made again and again.
    """
    size = ops_for(logits).verify_workspace_bytes(logits, sampling.changes_logits)
    return new_workspace(size, logits)
