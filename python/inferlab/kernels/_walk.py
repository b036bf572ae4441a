"""What all verify_tree_* ops share: their result, their workspace, their flat arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from inferlab.kernels._registry import as_tensor, empty, new_workspace, ops_for
from inferlab.kernels.build_tree import TreeLinks
from inferlab.kernels.sample import NUM_SAMPLING_FIELDS, SAMPLING_SCHEMA
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


def numpy_result(result: VerifyResult) -> VerifyResult:
    """The same result as arrays, for callers who gave arrays."""
    return VerifyResult(*(t.numpy() for t in result))  # type: ignore[arg-type]


def tensor_links(links: TreeLinks) -> TreeLinks:
    """The same links as tensors."""
    return TreeLinks(*(as_tensor(t) for t in links))


def new_result(logits: torch.Tensor) -> VerifyResult:
    """Room for the result of logits [B, N, V]."""
    if logits.dim() != 3:
        raise ValueError(f"logits has shape {list(logits.shape)}; it must be [B, N, V]")
    batch, nodes, _ = logits.shape
    return VerifyResult(
        empty((batch, nodes), logits, torch.int32),
        empty((batch, nodes), logits, torch.int32),
        empty((batch,), logits, torch.int32),
    )


def filled(
    values: tuple[torch.Tensor, torch.Tensor, torch.Tensor], out: VerifyResult | None
) -> VerifyResult:
    """What the reference found, in ``out`` where that is given."""
    if out is None:
        return VerifyResult(*values)
    return VerifyResult(*(o.copy_(v) for o, v in zip(out, values, strict=True)))


def verify_workspace(logits: torch.Tensor, sampling: SamplingTensors) -> torch.Tensor | None:
    """Scratch memory that serves the verifiers for these shapes; None where they need none.

    Its contents do not matter, before and after. To be given where the call may not allocate, or
    is made again and again.
    """
    ops = ops_for(logits)
    if ops is None:
        return None
    return new_workspace(ops.verify_workspace_bytes(logits, sampling.changes_logits), logits)


def room_for(
    logits: torch.Tensor,
    sampling: SamplingTensors,
    out: VerifyResult | None,
    workspace: torch.Tensor | None,
) -> tuple[VerifyResult, torch.Tensor | None]:
    """Where a verifier writes: what the caller gave, and new memory for what it left out."""
    return (
        new_result(logits) if out is None else out,
        verify_workspace(logits, sampling) if workspace is None else workspace,
    )


def allowed_columns(allowed_vocab: int | None) -> int:
    """As the kernels take it: -1 for all columns."""
    return -1 if allowed_vocab is None else max(allowed_vocab, 0)


def fake_result(
    logits: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shapes and dtypes of the outputs, for torch.compile."""
    batch, nodes = logits.shape[:2]
    walk = [logits.new_empty((batch, nodes), dtype=torch.int32) for _ in range(2)]
    return walk[0], walk[1], logits.new_empty((batch,), dtype=torch.int32)


def split_arguments(rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """tokens, links, seq_lens, sampling and whatever follows, from flat op arguments."""
    tokens, depth, first_child, next_sibling, seq_lens = rest[:5]
    links = TreeLinks(depth, first_child, next_sibling, depth)
    sampling = SamplingTensors(*rest[5 : 5 + NUM_SAMPLING_FIELDS])
    return (tokens, links, seq_lens, sampling, *rest[5 + NUM_SAMPLING_FIELDS :])


TREE_SCHEMA = (
    "Tensor tokens, Tensor depth, Tensor first_child, Tensor next_sibling, Tensor seq_lens, "
    + SAMPLING_SCHEMA
)
