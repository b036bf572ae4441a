"""RMSNorm, gated SiLU and rotary + append, rounded where the unfused layer rounds; x's precision
at least is kept: float64 in, float64 throughout.
"""

from __future__ import annotations

import torch

from inferlab.kernels.reference.kv import kv_append


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0
) -> torch.Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if not offset:
        normed = normed.to(x.dtype).to(wide.dtype)
    return (normed * (weight.to(wide.dtype) + offset)).to(x.dtype)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One head of one token, [D]: (a, b) -> (a cos - b sin, b cos + a sin) for its pairs."""
    half = cos.shape[0] // 2
    a, b, rest = x[:half], x[half : 2 * half], x[2 * half :]
    first = a * cos[:half] + -b * sin[:half]
    second = b * cos[half:] + a * sin[half:]
    return torch.cat((first, second, rest))


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    node_offset: int = 0,
    num_nodes: torch.Tensor | None = None,
) -> None:
    turned = k.clone()
    for b in range(q.shape[0]):
        for n in range(q.shape[1] if num_nodes is None else int(num_nodes[b])):
            at = b if cos.shape[0] > 1 else 0
            for x in (q[b, n], turned[b, n]):
                for head in x:
                    head.copy_(rotate(head, cos[at, n], sin[at, n]))
    kv_append(
        turned,
        v,
        k_pages,
        v_pages,
        block_table,
        seq_lens,
        node_offset=node_offset,
        num_nodes=num_nodes,
    )
