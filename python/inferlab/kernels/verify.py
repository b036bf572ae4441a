"""verify_tree_match, verify_tree_rejection: walk a draft tree and lose nothing by it."""

from __future__ import annotations

import torch

from inferlab.kernels._registry import run
from inferlab.kernels._walk import VerifyResult, new_result
from inferlab.kernels.build_tree import TreeLinks
from inferlab.kernels.sample import allowed_columns
from inferlab.kernels.sampling_params import SamplingTensors


def verify_tree_match(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    links: TreeLinks,
    seq_lens: torch.Tensor,
    sampling: SamplingTensors,
    *,
    allowed_vocab: int | None = None,
    out: VerifyResult | None = None,
    workspace: torch.Tensor | None = None,
) -> VerifyResult:
    """Accepts a child where it is the target's own choice: lossless and seed-exact.

    The target's choice at a node is what `sample` draws from that row (purpose 0, at the absolute
    position seq_len + depth + 1), so the walk emits the very tokens of plain decoding. Reads only
    the rows that the walk visits.

    Args:
        logits: f32, bf16 or f16 [B, N, V], contiguous in the last dimension.
        tokens: i32[B, N], the tree's tokens; 0 <= token < V except at padding nodes.
        links: of `build_tree`.
        seq_lens: i32[B], committed tokens: the root's absolute position.
        sampling: penalties count the context and the path from the root to the node.
        allowed_vocab: columns from here on are padding and never chosen.
        out: where the result goes.
        workspace: of `verify_workspace`.

    Returns:
        VerifyResult.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    out = new_result(logits) if out is None else out
    run(
        logits,
        "verify_tree_match",
        logits,
        tokens,
        links.first_child,
        links.next_sibling,
        seq_lens,
        *sampling.flat,
        allowed_columns(allowed_vocab),
        *out,
        workspace,
    )
    return out


def verify_tree_rejection(
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    links: TreeLinks,
    seq_lens: torch.Tensor,
    sampling: SamplingTensors,
    *,
    with_replacement: bool = False,
    allowed_vocab: int | None = None,
    out: VerifyResult | None = None,
    workspace: torch.Tensor | None = None,
) -> VerifyResult:
    """Accepts a child x with probability min(1, p(x) / q(x)): lossless in distribution.

    Chains: Leviathan et al. 2023 and Chen et al. 2023. Trees: the multi-round rule of SpecInfer
    (Miao et al. 2024): after each rejected sibling p becomes norm(max(p - q, 0)), and without
    replacement q loses that sibling's token and is renormalised. A token with p = 0 is never
    accepted; where rounding leaves no residual, p stays as it was. Without replacement a
    duplicate sibling is passed over; with replacement it is a try of its own. The token at the
    last node is drawn from what p has become. At temperature 0 this is `verify_tree_match`. On CUDA
    no more than 128 siblings of a node are tried; the rest are passed over, which is as lossless.

    Args:
        logits, tokens, links, seq_lens, sampling, allowed_vocab: as in verify_tree_match.
        draft_logits: f32, bf16 or f16 [B, N, V]: row n holds the draft model's raw logits that the
            children of n were drawn from, with the same temperature, top-k, top-p and min-p and
            without penalties. None: a deterministic drafter, q is a point mass at each child. A row
            that cannot be sampled from: its children are passed over. On CUDA of logits' dtype or
            f32.
        with_replacement: whether siblings were drawn independently of each other.
        out: where the result goes.
        workspace: of `verify_workspace`.

    Returns:
        VerifyResult.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    out = new_result(logits) if out is None else out
    run(
        logits,
        "verify_tree_rejection",
        logits,
        draft_logits,
        tokens,
        links.first_child,
        links.next_sibling,
        seq_lens,
        *sampling.flat,
        with_replacement,
        allowed_columns(allowed_vocab),
        *out,
        workspace,
    )
    return out
