"""RMSNorm, gated SiLU and rotary + append in plain torch: the oracle, and the op off the CPU."""

from __future__ import annotations

import torch

from inferlab.kernels.reference.kv import kv_append


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0
) -> torch.Tensor:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    scaled = normed.to(x.dtype).to(wide.dtype) * (weight.to(wide.dtype) + offset)
    return scaled.to(x.dtype)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    out = torch.nn.functional.linear(x, weight, bias)
    return out if residual is None else residual + out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x: [B, N, H, D]; cos, sin: [B or 1, N, rotary]."""
    rotary = cos.shape[-1]
    turned, rest = x[..., :rotary], x[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]
    return torch.cat((turned, rest), dim=-1)


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
    rotated = rotate(q, cos, sin)
    if num_nodes is None:
        q.copy_(rotated)
    else:
        real = torch.arange(q.shape[1], device=q.device)[None] < num_nodes[:, None]
        q.copy_(torch.where(real[..., None, None], rotated, q))
    kv_append(
        rotate(k, cos, sin),
        v,
        k_pages,
        v_pages,
        block_table,
        seq_lens,
        node_offset=node_offset,
        num_nodes=num_nodes,
    )
