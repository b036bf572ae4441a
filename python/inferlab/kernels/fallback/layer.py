"""RMSNorm, gated SiLU, products and rotary + append in torch operations."""

from __future__ import annotations

import torch

from inferlab.kernels.fallback.kv import kv_append
from inferlab.kernels.packed_weight import PackedWeight, unpack


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, eps: float = 1e-6, offset: float = 0.0
) -> None:
    """As `inferlab.kernels.rms_norm`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out.copy_(normed.to(x.dtype).float() * (weight.float() + offset))


def silu_mul(x: torch.Tensor, out: torch.Tensor) -> None:
    """As `inferlab.kernels.silu_mul`."""
    gate, up = x.chunk(2, dim=-1)
    torch.mul(torch.nn.functional.silu(gate), up, out=out)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    constant_weight: bool = False,
) -> None:
    """As `inferlab.kernels.linear`, by the framework's product."""
    if bias is None:
        torch.matmul(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
    if residual is not None:
        torch.add(residual, out, out=out)


def packed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bits: int,
    group: int,
    zeros: bool,
    order: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """As `inferlab.kernels.packed_linear`, by the framework's product with the unpacked weight."""
    packed = PackedWeight(weight, bits, group, out.shape[1], x.shape[1], zeros)
    ordered = x if order is None else x[:, order.long()]
    wide = rounded_to_8_bits(ordered.float(), group) @ unpack(packed).t()
    if bias is not None:
        wide += bias.float()
    out.copy_(wide)
    if residual is not None:
        torch.add(residual, out, out=out)


def rounded_to_8_bits(x: torch.Tensor, group: int) -> torch.Tensor:
    """x [rows, in] with each group of inputs as multiples of its largest by 127."""
    rows, inputs = x.shape
    groups = torch.nn.functional.pad(x, (0, -inputs % group)).view(rows, -1, group)
    most = groups.abs().amax(-1, keepdim=True)
    rounded = torch.where(most >= 1e-35, groups * (127 / most), 0.0).round() * (most / 127)
    rounded = torch.where(most.isfinite(), rounded, torch.nan)
    return rounded.view(rows, -1)[:, :inputs]


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
    node_offset: int = 0,
    num_nodes: torch.Tensor | None = None,
) -> None:
    """As `inferlab.kernels.rope_append`."""
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
        node_offset,
        num_nodes,
    )
