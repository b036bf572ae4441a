"""verify_tree_lossy: walk a draft tree as far as the target finds its tokens good enough."""

from __future__ import annotations

import torch

from inferlab.kernels import reference
from inferlab.kernels._registry import as_tensor, is_compiling, is_numpy, ops_for, register
from inferlab.kernels._walk import (
    TREE_SCHEMA,
    VerifyResult,
    allowed_columns,
    fake_result,
    filled,
    numpy_result,
    room_for,
    split_arguments,
    tensor_links,
)
from inferlab.kernels.build_tree import TreeLinks
from inferlab.kernels.sampling_params import SamplingTensors

LOSSY_POLICIES = ("conf_threshold", "topk_agree", "typical")


def _run_lossy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    links: TreeLinks,
    seq_lens: torch.Tensor,
    sampling: SamplingTensors,
    policy: str,
    threshold: float,
    allowed_vocab: int | None,
    out: VerifyResult | None = None,
    workspace: torch.Tensor | None = None,
) -> VerifyResult:
    if policy not in LOSSY_POLICIES:
        raise ValueError(f"policy is {policy!r}; it must be one of {', '.join(LOSSY_POLICIES)}")
    if policy == "topk_agree":
        if not 1 <= threshold < 2**31:
            raise ValueError(f"threshold is {threshold}; k must be >= 1 for topk_agree")
    elif not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold is {threshold}; it must be in [0, 1] for {policy}")
    ops = ops_for(logits)
    if ops is None:
        result = reference.verify_tree_lossy(
            logits,
            tokens,
            links,
            seq_lens,
            sampling,
            policy,
            threshold,
            allowed_vocab=allowed_vocab,
        )
        return filled(result, out)
    out, workspace = room_for(logits, sampling, out, workspace)
    ops.verify_tree_lossy(
        logits,
        tokens,
        links.first_child,
        links.next_sibling,
        seq_lens,
        sampling.flat,
        LOSSY_POLICIES.index(policy),
        threshold,
        allowed_columns(allowed_vocab),
        *out,
        workspace,
    )
    return out


def verify_tree_lossy(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    links: TreeLinks,
    seq_lens: torch.Tensor,
    sampling: SamplingTensors,
    policy: str,
    threshold: float,
    *,
    allowed_vocab: int | None = None,
    out: VerifyResult | None = None,
    workspace: torch.Tensor | None = None,
) -> VerifyResult:
    """Accepts children that the target finds good enough. Changes the output's distribution.

    The first accepted child, in order, is entered; where none is, the target's own choice (as in
    verify_tree_match) is emitted. p is the target's distribution after the filters; at temperature
    0 it is the softmax of the penalised logits, untruncated, since a one-hot p would make every
    policy the exact one. A token of probability 0 is never accepted.

    Args:
        logits, tokens, links, seq_lens, sampling, allowed_vocab: as in verify_tree_match.
        policy: "conf_threshold": p(x) >= threshold. "topk_agree": x is among the int(threshold)
            most probable tokens, ties by lower id. "typical": x is in the locally typical set of
            mass threshold (Meister et al., "Locally typical sampling", 2022).
        threshold: in [0, 1]; for topk_agree >= 1.
        out: where the result goes.
        workspace: of `verify_workspace`.

    Returns:
        VerifyResult.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.
    """
    if is_compiling():
        out = torch.ops.inferlab.verify_tree_lossy(
            logits,
            tokens,
            *links[:3],
            seq_lens,
            *sampling.flat,
            policy,
            float(threshold),
            allowed_vocab,
        )
        return VerifyResult(*out)
    if is_numpy(logits):
        arrays = as_tensor(logits), as_tensor(tokens), tensor_links(links), as_tensor(seq_lens)
        return numpy_result(_run_lossy(*arrays, sampling, policy, threshold, allowed_vocab))
    return _run_lossy(
        logits, tokens, links, seq_lens, sampling, policy, threshold, allowed_vocab, out, workspace
    )


register(
    f"verify_tree_lossy(Tensor logits, {TREE_SCHEMA}, str policy, float threshold, "
    "int? allowed_vocab) -> (Tensor, Tensor, Tensor)",
    lambda logits, *rest: tuple(_run_lossy(logits, *split_arguments(rest))),
    fake_result,
)
