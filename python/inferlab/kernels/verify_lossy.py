"""verify_tree_lossy: walk a draft tree as far as the target finds its tokens good enough."""

from __future__ import annotations

import torch

from inferlab import _C
from inferlab.kernels._registry import run
from inferlab.kernels._walk import VerifyResult, new_result
from inferlab.kernels.build_tree import TreeLinks
from inferlab.kernels.sample import allowed_columns
from inferlab.kernels.sampling_params import SamplingTensors

LOSSY_POLICIES: tuple[str, ...] = _C.LOSSY_POLICIES


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
    if policy not in LOSSY_POLICIES:
        raise ValueError(f"policy is {policy!r}; it must be one of {', '.join(LOSSY_POLICIES)}")
    out = new_result(logits) if out is None else out
    run(
        logits,
        "verify_tree_lossy",
        logits,
        tokens,
        links.first_child,
        links.next_sibling,
        seq_lens,
        *sampling.flat,
        LOSSY_POLICIES.index(policy),
        float(threshold),
        allowed_columns(allowed_vocab),
        *out,
        workspace,
    )
    return out
