"""verify_tree_*: walk a draft tree under an acceptance policy; one or more tokens come out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from inferlab.kernels import reference
from inferlab.kernels._registry import (
    as_tensor,
    empty,
    is_compiling,
    is_numpy,
    new_workspace,
    ops_for,
    register,
)
from inferlab.kernels.build_tree import TreeLinks
from inferlab.kernels.sample import NUM_SAMPLING_FIELDS, SAMPLING_SCHEMA
from inferlab.kernels.sampling_params import SamplingTensors

LOSSY_POLICIES = ("conf_threshold", "topk_agree", "typical")


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


def _numpy_result(result: VerifyResult) -> VerifyResult:
    return VerifyResult(*(t.numpy() for t in result))  # type: ignore[arg-type]


def _tensor_links(links: TreeLinks) -> TreeLinks:
    return TreeLinks(*(as_tensor(t) for t in links))


def _outputs(logits: torch.Tensor) -> VerifyResult:
    if logits.dim() != 3:
        raise ValueError(f"logits has shape {list(logits.shape)}; it must be [B, N, V]")
    batch, nodes, _ = logits.shape
    return VerifyResult(
        empty((batch, nodes), logits, torch.int32),
        empty((batch, nodes), logits, torch.int32),
        empty((batch,), logits, torch.int32),
    )


def _result(
    values: tuple[torch.Tensor, torch.Tensor, torch.Tensor], out: VerifyResult | None
) -> VerifyResult:
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


def _allowed(allowed_vocab: int | None) -> int:
    return -1 if allowed_vocab is None else max(allowed_vocab, 0)


def _run_match(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    links: TreeLinks,
    seq_lens: torch.Tensor,
    sampling: SamplingTensors,
    allowed_vocab: int | None,
    out: VerifyResult | None = None,
    workspace: torch.Tensor | None = None,
) -> VerifyResult:
    ops = ops_for(logits)
    if ops is None:
        result = reference.verify_tree_match(
            logits, tokens, links, seq_lens, sampling, allowed_vocab=allowed_vocab
        )
        return _result(result, out)
    if out is None:
        out = _outputs(logits)
    if workspace is None:
        workspace = verify_workspace(logits, sampling)
    ops.verify_tree_match(
        logits,
        tokens,
        links.first_child,
        links.next_sibling,
        seq_lens,
        sampling.flat,
        _allowed(allowed_vocab),
        *out,
        workspace,
    )
    return out


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
    if is_compiling():
        out = torch.ops.inferlab.verify_tree_match(
            logits, tokens, *links[:3], seq_lens, *sampling.flat, allowed_vocab
        )
        return VerifyResult(*out)
    if is_numpy(logits):
        arrays = as_tensor(logits), as_tensor(tokens), _tensor_links(links), as_tensor(seq_lens)
        return _numpy_result(_run_match(*arrays, sampling, allowed_vocab))
    return _run_match(logits, tokens, links, seq_lens, sampling, allowed_vocab, out, workspace)


def _run_rejection(
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    links: TreeLinks,
    seq_lens: torch.Tensor,
    sampling: SamplingTensors,
    with_replacement: bool,
    allowed_vocab: int | None,
    out: VerifyResult | None = None,
    workspace: torch.Tensor | None = None,
) -> VerifyResult:
    ops = ops_for(logits)
    if ops is None:
        result = reference.verify_tree_rejection(
            logits,
            draft_logits,
            tokens,
            links,
            seq_lens,
            sampling,
            with_replacement=with_replacement,
            allowed_vocab=allowed_vocab,
        )
        return _result(result, out)
    if out is None:
        out = _outputs(logits)
    if workspace is None:
        workspace = verify_workspace(logits, sampling)
    ops.verify_tree_rejection(
        logits,
        draft_logits,
        tokens,
        links.first_child,
        links.next_sibling,
        seq_lens,
        sampling.flat,
        with_replacement,
        _allowed(allowed_vocab),
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
    if is_compiling():
        out = torch.ops.inferlab.verify_tree_rejection(
            logits,
            draft_logits,
            tokens,
            *links[:3],
            seq_lens,
            *sampling.flat,
            with_replacement,
            allowed_vocab,
        )
        return VerifyResult(*out)
    if is_numpy(logits):
        return _numpy_result(
            _run_rejection(
                as_tensor(logits),
                as_tensor(draft_logits),
                as_tensor(tokens),
                _tensor_links(links),
                as_tensor(seq_lens),
                sampling,
                with_replacement,
                allowed_vocab,
            )
        )
    return _run_rejection(
        logits,
        draft_logits,
        tokens,
        links,
        seq_lens,
        sampling,
        with_replacement,
        allowed_vocab,
        out,
        workspace,
    )


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
        return _result(result, out)
    if out is None:
        out = _outputs(logits)
    if workspace is None:
        workspace = verify_workspace(logits, sampling)
    ops.verify_tree_lossy(
        logits,
        tokens,
        links.first_child,
        links.next_sibling,
        seq_lens,
        sampling.flat,
        LOSSY_POLICIES.index(policy),
        threshold,
        _allowed(allowed_vocab),
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
        arrays = as_tensor(logits), as_tensor(tokens), _tensor_links(links), as_tensor(seq_lens)
        return _numpy_result(_run_lossy(*arrays, sampling, policy, threshold, allowed_vocab))
    return _run_lossy(
        logits, tokens, links, seq_lens, sampling, policy, threshold, allowed_vocab, out, workspace
    )


def _fake(logits: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, nodes = logits.shape[:2]
    walk = [logits.new_empty((batch, nodes), dtype=torch.int32) for _ in range(2)]
    return walk[0], walk[1], logits.new_empty((batch,), dtype=torch.int32)


def _split(rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """tokens, links, seq_lens, sampling and whatever follows, from flat op arguments."""
    tokens, depth, first_child, next_sibling, seq_lens = rest[:5]
    links = TreeLinks(depth, first_child, next_sibling, depth)
    sampling = SamplingTensors(*rest[5 : 5 + NUM_SAMPLING_FIELDS])
    return (tokens, links, seq_lens, sampling, *rest[5 + NUM_SAMPLING_FIELDS :])


_TREE_SCHEMA = (
    "Tensor tokens, Tensor depth, Tensor first_child, Tensor next_sibling, Tensor seq_lens, "
    + SAMPLING_SCHEMA
)
register(
    f"verify_tree_match(Tensor logits, {_TREE_SCHEMA}, int? allowed_vocab) "
    "-> (Tensor, Tensor, Tensor)",
    lambda logits, *rest: tuple(_run_match(logits, *_split(rest))),
    _fake,
)
register(
    f"verify_tree_rejection(Tensor logits, Tensor? draft_logits, {_TREE_SCHEMA}, "
    "bool with_replacement, int? allowed_vocab) -> (Tensor, Tensor, Tensor)",
    lambda logits, draft, *rest: tuple(_run_rejection(logits, draft, *_split(rest))),
    _fake,
)
register(
    f"verify_tree_lossy(Tensor logits, {_TREE_SCHEMA}, str policy, float threshold, "
    "int? allowed_vocab) -> (Tensor, Tensor, Tensor)",
    lambda logits, *rest: tuple(_run_lossy(logits, *_split(rest))),
    _fake,
)
