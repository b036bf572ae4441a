"""sample and the verifiers on Metal, with the arguments of `_C` (csrc/bindings/bind_sampling.cpp).

Rows are worked on by one threadgroup each. Where penalties or biases change them, it does so in a
copy in the workspace.
"""

from __future__ import annotations

import torch

from inferlab.kernels.metal.checks import check, check_aligned, check_element, shape_of
from inferlab.kernels.metal.shaders import SIMD_WIDTH, THREADS, Shaders

Flat = tuple[torch.Tensor | None, ...]  # SamplingTensors.flat

# At most so many rows are copied at a time by `sample`.
ROWS_IN_FLIGHT = 64
REJECTION_ROWS = 3  # a row's copy, p and q
# Rows up to this size are a simdgroup's work: there is nothing to share out.
SMALL_VOCAB = 256

_COLUMNS = (
    ("temperature", torch.float32),
    ("top_k", torch.int32),
    ("top_p", torch.float32),
    ("min_p", torch.float32),
    ("seed", torch.int64),
    ("repetition_penalty", torch.float32),
    ("presence_penalty", torch.float32),
    ("frequency_penalty", torch.float32),
)


def _sampling(fields: Flat, logits: torch.Tensor) -> tuple[list[torch.Tensor], list[int]]:
    """The thirteen buffers of Sampling, and the fields of SamplingSizes (csrc/metal/row.h)."""
    if len(fields) != 13:
        raise ValueError(
            f"sampling has {len(fields)} fields; it must be SamplingTensors.flat, with 13"
        )
    batch = logits.shape[0]
    for (name, dtype), t in zip(_COLUMNS, fields, strict=False):
        if t is not None:
            check(name, t, logits, (batch,), dtype)
    context, context_lens, prompt_lens, bias_tokens, bias_values = fields[8:]
    penalties = [t is not None for t in fields[5:8]]
    context_size = bias_size = 0
    if any(penalties):
        if context is None or context_lens is None or prompt_lens is None:
            raise ValueError(
                "context_tokens, context_lens and prompt_lens must be given: a penalty is on"
            )
        check("context_tokens", context, logits, (batch, None), torch.int32)
        check("context_lens", context_lens, logits, (batch,), torch.int32)
        check("prompt_lens", prompt_lens, logits, (batch,), torch.int32)
        context_size = context.shape[1]
    if bias_tokens is not None:
        if bias_values is None:
            raise ValueError("bias_values is None; bias_tokens needs it")
        check("bias_tokens", bias_tokens, logits, (batch, None), torch.int32)
        check("bias_values", bias_values, logits, bias_tokens.shape, torch.float32)
        bias_size = bias_tokens.shape[1]
    stand_in = fields[0]  # bound where there is nothing to bind; not read
    assert stand_in is not None
    buffers = [stand_in if t is None or t.numel() == 0 else t for t in fields]
    return buffers, [*map(int, penalties), context_size, bias_size]


def _changes_logits(sizes: list[int]) -> bool:
    *penalties, _, bias_size = sizes
    return any(penalties) or bias_size > 0


def _check_logits(name: str, logits: torch.Tensor, allowed_vocab: int) -> tuple[int, int]:
    """The element type and how many columns may be chosen."""
    element = check_element(name, logits)
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension")
    vocab = logits.shape[-1]
    if logits.numel() == 0 or vocab >= 2**31:
        raise ValueError(
            f"{name} has shape {shape_of(logits)}; "
            "no dimension may be 0, and the vocabulary must be below 2^31"
        )
    if allowed_vocab != -1 and allowed_vocab < 1:
        raise ValueError(f"allowed_vocab is {allowed_vocab}; it must be >= 1")
    return element, vocab if allowed_vocab < 0 else min(allowed_vocab, vocab)


def _threads(vocab: int) -> int:
    """Of the threadgroup that works on a row."""
    return THREADS if vocab > SMALL_VOCAB else SIMD_WIDTH


def _floats(workspace: torch.Tensor | None, needed: int, like: torch.Tensor) -> torch.Tensor:
    """The workspace as float32, allocated if the caller has none."""
    if workspace is None:
        return torch.empty(max(needed, 1), dtype=torch.float32, device=like.device)
    check("workspace", workspace, like, (None,), torch.uint8)
    if workspace.numel() < 4 * needed:
        raise ValueError(
            f"workspace has {workspace.numel()} bytes; it must have at least {4 * needed}"
        )
    check_aligned({"workspace": workspace})
    return workspace


def sample_workspace_bytes(
    shaders: Shaders, logits: torch.Tensor, changes_logits: bool, keys: bool
) -> int:
    """A float32 copy of each row in flight, where penalties or biases change them."""
    rows = min(logits[..., 0].numel(), ROWS_IN_FLIGHT)
    return 4 * rows * logits.shape[-1] if changes_logits else 0


def verify_workspace_bytes(shaders: Shaders, logits: torch.Tensor, changes_logits: bool) -> int:
    """Rows of float32 for each sequence: as many as the verifier that needs most."""
    return 4 * REJECTION_ROWS * logits.shape[0] * logits.shape[-1]


def sample(
    shaders: Shaders,
    logits: torch.Tensor,
    positions: torch.Tensor,
    sampling: Flat,
    purpose: int,
    num_samples: int,
    allowed_vocab: int,
    out: torch.Tensor,
    scores: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits has shape {shape_of(logits)}; it must be [B, V] or [B, N, V]")
    element, vocab = _check_logits("logits", logits, allowed_vocab)
    buffers, sizes = _sampling(sampling, logits)
    if not 0 <= purpose <= 3:
        raise ValueError(f"purpose is {purpose}; it must be in [0, 3]")
    if not 1 <= num_samples <= 65536:
        raise ValueError(f"num_samples is {num_samples}; it must be in [1, 65536]")
    rows = logits.shape[:-1]
    check("positions", positions, logits, rows, torch.int64)
    check("tokens", out, logits, (*rows, num_samples), torch.int32)
    if scores is not None:
        check("scores", scores, logits, (*rows, num_samples), torch.float32)
    count, nodes = rows.numel(), rows[1] if len(rows) == 2 else 1
    copies = _changes_logits(sizes)
    groups = min(count, ROWS_IN_FLIGHT) if copies else count
    params = [
        *sizes,
        logits.stride(0),
        logits.stride(1) if len(rows) == 2 else 0,
        *(count, nodes, vocab, num_samples, purpose, groups, scores is not None),
    ]
    scratch = _floats(workspace, groups * vocab if copies else 0, logits)
    args = [logits, positions, *buffers, out, out if scores is None else scores, scratch, params]
    threads = _threads(vocab)
    shaders.run("sample", args, (groups,), threads=threads, ELEMENT=element, GROUP=threads)


def _walk(
    shaders: Shaders,
    name: str,
    tensors: dict[str, torch.Tensor],
    sampling: Flat,
    allowed_vocab: int,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    workspace: torch.Tensor | None,
    *,
    draft_logits: torch.Tensor | None = None,
    rows: int = 1,
    params: list[int] | None = None,
    floats: list[float] | None = None,
) -> None:
    """Runs the verifier `name`. rows: floats of the workspace per sequence, in rows of logits."""
    logits = tensors["logits"]
    if logits.dim() != 3:
        raise ValueError(f"logits has shape {shape_of(logits)}; it must have 3 dimensions")
    element, vocab = _check_logits("logits", logits, allowed_vocab)
    batch, nodes, _ = logits.shape
    buffers, sizes = _sampling(sampling, logits)
    for key in ("tokens", "links.first_child", "links.next_sibling"):
        check(key, tensors[key], logits, (batch, nodes), torch.int32)
    check("seq_lens", tensors["seq_lens"], logits, (batch,), torch.int32)
    shapes = ((batch, nodes), (batch, nodes), (batch,))
    names = ("accepted_nodes", "accepted_tokens", "num_accepted")
    for key, t, shape in zip(names, outputs, shapes, strict=True):
        check(key, t, logits, shape, torch.int32)
    copies = rows > 1 or _changes_logits(sizes)
    scratch = _floats(workspace, rows * batch * vocab if copies else 0, logits)
    walk = [*sizes, logits.stride(0), logits.stride(1), nodes, vocab, *(params or [])]
    args: list[object] = [*tensors.values(), *buffers, *outputs, scratch]
    if draft_logits is not None:
        args.append(draft_logits)
    args.append(walk)
    if floats is not None:
        args.append(floats)
    threads = _threads(vocab)
    shaders.run(name, args, (batch,), threads=threads, ELEMENT=element, GROUP=threads)


def verify_tree_match(
    shaders: Shaders,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    first_child: torch.Tensor,
    next_sibling: torch.Tensor,
    seq_lens: torch.Tensor,
    sampling: Flat,
    allowed_vocab: int,
    accepted_nodes: torch.Tensor,
    accepted_tokens: torch.Tensor,
    num_accepted: torch.Tensor,
    workspace: torch.Tensor | None = None,
) -> None:
    tree = _tree(logits, tokens, first_child, next_sibling, seq_lens)
    outputs = (accepted_nodes, accepted_tokens, num_accepted)
    _walk(shaders, "verify_tree_match", tree, sampling, allowed_vocab, outputs, workspace)


def verify_tree_rejection(
    shaders: Shaders,
    logits: torch.Tensor,
    draft_logits: torch.Tensor | None,
    tokens: torch.Tensor,
    first_child: torch.Tensor,
    next_sibling: torch.Tensor,
    seq_lens: torch.Tensor,
    sampling: Flat,
    with_replacement: bool,
    allowed_vocab: int,
    accepted_nodes: torch.Tensor,
    accepted_tokens: torch.Tensor,
    num_accepted: torch.Tensor,
    workspace: torch.Tensor | None = None,
) -> None:
    draft = logits
    if draft_logits is not None:
        if draft_logits.dtype != logits.dtype:  # one element type: float32 holds them all
            check_element("draft_logits", draft_logits)
            check_element("logits", logits)
            logits, draft_logits = logits.float(), draft_logits.float()
        check("draft_logits", draft_logits, logits, logits.shape, logits.dtype, contiguous=False)
        draft = draft_logits
    tree = _tree(logits, tokens, first_child, next_sibling, seq_lens)
    outputs = (accepted_nodes, accepted_tokens, num_accepted)
    params = [
        *draft.stride()[:2],
        int(draft_logits is not None),
        int(with_replacement),
    ]
    _walk(
        shaders,
        "verify_tree_rejection",
        tree,
        sampling,
        allowed_vocab,
        outputs,
        workspace,
        draft_logits=draft,
        rows=REJECTION_ROWS,
        params=params,
    )


def verify_tree_lossy(
    shaders: Shaders,
    logits: torch.Tensor,
    tokens: torch.Tensor,
    first_child: torch.Tensor,
    next_sibling: torch.Tensor,
    seq_lens: torch.Tensor,
    sampling: Flat,
    policy: int,
    threshold: float,
    allowed_vocab: int,
    accepted_nodes: torch.Tensor,
    accepted_tokens: torch.Tensor,
    num_accepted: torch.Tensor,
    workspace: torch.Tensor | None = None,
) -> None:
    if not 0 <= policy <= 2:
        raise ValueError(f"policy is {policy}; it must be in [0, 2]")
    tree = _tree(logits, tokens, first_child, next_sibling, seq_lens)
    outputs = (accepted_nodes, accepted_tokens, num_accepted)
    _walk(
        shaders,
        "verify_tree_lossy",
        tree,
        sampling,
        allowed_vocab,
        outputs,
        workspace,
        params=[policy, int(threshold)],
        floats=[float(threshold)],
    )


def _tree(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    first_child: torch.Tensor,
    next_sibling: torch.Tensor,
    seq_lens: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The first buffers of every verifier, by the names that errors give them."""
    return {
        "logits": logits,
        "tokens": tokens,
        "links.first_child": first_child,
        "links.next_sibling": next_sibling,
        "seq_lens": seq_lens,
    }
