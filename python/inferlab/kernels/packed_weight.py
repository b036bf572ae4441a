"""Weights of 8 or 4 bits, packed as ``inferlab/packed_weight.h`` says."""

from __future__ import annotations

from typing import NamedTuple

import torch

OUTPUTS = 16  # of a tile
BITS = (8, 4)
GROUPS = (32, 64, 128)
SMALLEST = 1e-37  # scale whose inverse is finite; what is smaller is 0
DAMPING = 0.01  # of the mean second moment, so that moments can be inverted
ROWS_AT_ONCE = 512  # outputs that are widened to fp32 together


class PackedWeight(NamedTuple):
    """A weight [out, in] as ``scale * (q - zero)``, zero ``2**(bits - 1)`` or told.

    Attributes:
        data: [tiles, bytes] uint8, sixteen outputs a tile: scales, zeros, if they are told, then q
            in the order of reading.
        bits: of q, 8 or 4.
        group: inputs that are rounded together: of x always, of the weight in 4 bits. In 8 bits an
            output has one scale.
        out_features, in_features: as they were.
        zeros: of 4 bits, scales are fp16 and each has a zero of its own; else bf16.
        order: [in] int32, which input of x stands at each one of ``data``; None: as they come.
    """

    data: torch.Tensor
    bits: int
    group: int
    out_features: int
    in_features: int
    zeros: bool = False
    order: torch.Tensor | None = None

    @property
    def num_scales(self) -> int:
        """Scales of an output."""
        return 1 if self.bits == 8 else -(-self.in_features // self.group)

    @property
    def scale_bytes(self) -> int:
        """Of a tile, up to where q begins."""
        return -(-self.num_scales * OUTPUTS * (3 if self.zeros else 2) // 64) * 64


def pack(
    weight: torch.Tensor, bits: int, group: int = 32, moments: torch.Tensor | None = None
) -> PackedWeight:
    """Rounds a weight, with the scales (bf16) that leave the least squared error of its elements.

    Args:
        weight: [out, in], floating point.
        bits: 8 or 4.
        group: 32, 64 or 128.
        moments: [in, in], the sum of x x^T over inputs. With it inputs are rounded one after the
            other, and those behind make up for the error that each leaves in the product (GPTQ,
            Frantar et al., 2022); None: each to nearest.

    Raises:
        ValueError: another number of bits or size of groups, a weight that is no matrix of finite
            numbers, or moments that are none of it.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; it must be 8 or 4")
    if group not in GROUPS:
        raise ValueError(f"group is {group}; it must be 32, 64 or 128")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [out, in], not empty")
    if not weight.is_floating_point():
        raise ValueError(f"weight has dtype {weight.dtype}; it must be of floating point")
    outputs, inputs = weight.shape
    follow = None
    if moments is not None:
        if moments.shape != (inputs, inputs) or not bool(moments.isfinite().all()):
            raise ValueError(f"moments must be [{inputs}, {inputs}], of finite numbers")
        follow = _what_follows(moments, -inputs % group)
    parts = [_packed(part, bits, group, follow) for part in weight.detach().split(ROWS_AT_ONCE)]
    return PackedWeight(torch.cat(parts), bits, group, outputs, inputs)


def pack_rounded(
    q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int
) -> PackedWeight | None:
    """Packs what is rounded already: ``scales * (q - zeros)``, of groups of inputs of equal length.

    Args:
        q: [out, in], whole numbers from 0 to 2**bits - 1.
        zeros, scales: [out, S], of each group; zeros whole numbers.

    Returns:
        None where the layout cannot hold it without loss: of 8 bits zeros other than 128, more than
        one group or scales that are not bf16's; of 4, groups that are no multiple of 32 inputs, or
        neither bf16's scales with zeros of 8 nor fp16's with some from 0 to 255; other bits.
    """
    outputs, inputs = q.shape
    count = scales.shape[1]
    size = inputs // count
    usual = bool((zeros == 2 ** (bits - 1)).all()) and _holds(scales, torch.bfloat16)
    told = _holds(scales, torch.float16) and bool(((zeros >= 0) & (zeros < 256)).all())
    if bits == 8 and count == 1 and usual:
        group, repeated = 64, 1
    elif bits == 4 and inputs % count == 0 and (usual or told):
        group = GROUPS[-1] if count == 1 else max((g for g in GROUPS if size % g == 0), default=0)
        if group == 0:
            return None
        repeated = -(-size // group)
    else:
        return None
    scales = scales.to(torch.bfloat16 if usual else torch.float16).repeat_interleave(repeated, 1)
    zeros = zeros.to(torch.int32).repeat_interleave(repeated, 1)
    more = -outputs % OUTPUTS
    scales = torch.nn.functional.pad(scales, (0, 0, 0, more))
    q = torch.nn.functional.pad(q, (0, -inputs % group, 0, more))
    # Beyond the last input q may be anything: these are 0. So are scales beyond the last output.
    zeros = torch.nn.functional.pad(zeros, (0, 0, 0, more))
    data = lay_out(q, scales, bits, None if usual else zeros)
    return PackedWeight(data, bits, group, outputs, inputs, not usual)


def _holds(numbers: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether they are finite numbers of a dtype."""
    there = numbers.to(dtype)
    return bool(there.isfinite().all()) and torch.equal(there.double(), numbers.double())


def packed_sizes(
    weight: torch.Tensor, bits: int, group: int = 32, zeros: bool = False, ordered: bool = False
) -> PackedWeight:
    """What `pack` would give (of ``zeros``, `pack_rounded`), not filled, on the weight's device."""
    outputs, inputs = weight.shape
    nothing = weight.new_empty(0, dtype=torch.uint8)
    sizes = PackedWeight(nothing, bits, group, outputs, inputs, zeros)
    size = sizes.scale_bytes + -(-inputs // group) * group * OUTPUTS * bits // 8
    order = weight.new_empty(inputs, dtype=torch.int32) if ordered else None
    return sizes._replace(data=sizes.data.new_empty(-(-outputs // OUTPUTS), size), order=order)


def _packed(
    weight: torch.Tensor, bits: int, group: int, follow: torch.Tensor | None
) -> torch.Tensor:
    """The tiles of some outputs, whole ones but for the last."""
    wide = weight.float()
    if not bool(wide.isfinite().all()):
        raise ValueError("weight has NaN or infinite elements; they cannot be rounded")
    wide = torch.nn.functional.pad(wide, (0, -wide.shape[1] % group, 0, -len(wide) % OUTPUTS))
    groups = wide.view(len(wide), 1 if bits == 8 else -1, wide.shape[1] if bits == 8 else group)
    if follow is None:
        scales = _scales(groups, bits)
        q = _rounded(groups, scales, bits).view(wide.shape)
    else:
        q, scales = _compensated(groups, bits, group, follow)
    return lay_out(q + 2 ** (bits - 1), scales, bits)


def _what_follows(moments: torch.Tensor, padding: int) -> torch.Tensor:
    """[in, in] fp32, upper triangular: row i, over its diagonal, is what a unit of error in input i
    asks of those behind it. The Cholesky factor of the inverse of the moments."""
    wide = moments.double()
    diagonal = wide.diagonal().clone()
    mean = float(diagonal.mean())
    unseen = diagonal <= 0
    wide = wide + torch.diag(torch.where(unseen, mean or 1.0, DAMPING * mean))
    factor = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(wide)), upper=True
    ).float()
    whole = torch.eye(len(factor) + padding)
    whole[: len(factor), : len(factor)] = factor
    return whole


def _compensated(
    groups: torch.Tensor, bits: int, group: int, follow: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q - zero [out, in], as floats, and scales [out, S]."""
    rest = groups.flatten(1).clone()
    q = torch.empty_like(rest)
    scales = _scales(groups, bits)
    for start in range(0, rest.shape[1], group):
        stop = start + group
        if bits == 8:
            scale = scales
        else:  # of what the inputs before left of it
            scale = _scales(rest[:, None, start:stop], bits)
            scales[:, start // group] = scale[:, 0]
        errors = torch.empty_like(rest[:, start:stop])
        for i in range(start, stop):
            column = rest[:, i, None, None]
            q[:, i] = _rounded(column, scale, bits)[:, 0, 0]
            left = (rest[:, i] - q[:, i] * scale[:, 0].float()) / follow[i, i]
            rest[:, i:stop] -= left[:, None] * follow[i, i:stop]
            errors[:, i - start] = left
        rest[:, stop:] -= errors @ follow[start:stop, stop:]
    return q, scales


def lay_out(
    q: torch.Tensor, scales: torch.Tensor, bits: int, zeros: torch.Tensor | None = None
) -> torch.Tensor:
    """The bytes of tiles: q [outputs, inputs], whole numbers from 0 on, and scales [outputs, S]
    bf16, or fp16 with as many zeros from 0 on, all padded to whole tiles and groups."""
    tiles = len(q) // OUTPUTS

    def by_tiles(numbers: torch.Tensor) -> torch.Tensor:
        of_tiles = numbers.view(tiles, OUTPUTS, -1).transpose(1, 2).reshape(tiles, -1)
        return of_tiles.contiguous().view(torch.uint8)

    head = by_tiles(scales)
    if zeros is not None:
        head = torch.cat((head, by_tiles(zeros.to(torch.uint8))), dim=1)
    head = torch.nn.functional.pad(head, (0, -head.shape[1] % 64))
    q = q.to(torch.uint8).view(tiles, OUTPUTS, -1, 4)
    if bits == 4:
        q = q[:, :, 0::2] | q[:, :, 1::2] << 4
    return torch.cat((head, q.transpose(1, 2).reshape(tiles, -1)), dim=1)


def unpack(packed: PackedWeight) -> torch.Tensor:
    """What a packed weight stands for: [out, in] fp32."""
    scales, zeros, q = parts(packed)
    wide = (q.view(len(q), packed.num_scales, -1) - zeros[:, :, None]).float()
    wide = (wide * scales.float()[:, :, None]).view(q.shape)
    wide = wide[: packed.out_features, : packed.in_features]
    if packed.order is None:
        return wide
    return torch.empty_like(wide).index_copy_(1, packed.order.long(), wide)


def parts(packed: PackedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales [outputs, S], bf16 or fp16, zeros as many, and q [outputs, inputs], both int32, of
    whole tiles and groups."""
    tiles, count = len(packed.data), packed.num_scales

    def by_outputs(numbers: torch.Tensor) -> torch.Tensor:
        of_tiles = numbers.view(tiles, count, OUTPUTS).transpose(1, 2)
        return of_tiles.reshape(tiles * OUTPUTS, count)

    stored = packed.data[:, : count * OUTPUTS * 2].contiguous()
    scales = by_outputs(stored.view(torch.float16 if packed.zeros else torch.bfloat16))
    if packed.zeros:
        after = packed.data[:, count * OUTPUTS * 2 : count * OUTPUTS * 3]
        zeros = by_outputs(after.to(torch.int32))
    else:
        zeros = torch.full(scales.shape, 2 ** (packed.bits - 1), dtype=torch.int32)
    q = (
        packed.data[:, packed.scale_bytes :]
        .view(tiles, -1, OUTPUTS, 4)
        .transpose(1, 2)
        .to(torch.int32)
    )
    if packed.bits == 4:
        q = torch.stack((q & 15, q >> 4), dim=3).flatten(2, 3)
    return scales, zeros, q.reshape(tiles * OUTPUTS, -1)


def _scales(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """Of groups [outputs, S, n], the best scale of each: [outputs, S] bf16."""
    most = groups.abs().amax(-1)
    highest = 2 ** (bits - 1) - 1
    best = (most / highest).bfloat16()
    if bits == 8:
        # The next larger number where bf16 has cut off: nothing is out of range.
        return torch.where(best.float() * 127 < most, _next_up(best), best)
    least = _error(groups, best, bits)
    for share in (0.75, 0.8, 0.85, 0.9, 0.95, 7 / 8):
        other = (most * share / highest).bfloat16()
        error = _error(groups, other, bits)
        best = torch.where(error < least, other, best)
        least = torch.minimum(least, error)
    return best


def _next_up(x: torch.Tensor) -> torch.Tensor:
    return (x.view(torch.int16) + 1).view(torch.bfloat16)


def _rounded(groups: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """q - zero, as floats."""
    scales = scales.float()[:, :, None]
    lowest = -127 if bits == 8 else -8
    inverse = torch.where(scales >= SMALLEST, 1 / scales, 0.0)
    return (groups * inverse).round_().clamp_(lowest, 2 ** (bits - 1) - 1)


def _error(groups: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    rounded = _rounded(groups, scales, bits) * scales.float()[:, :, None]
    return (rounded - groups).square_().sum(-1)
