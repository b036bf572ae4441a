"""Checkpoints whose weights come rounded, by GPTQ, AWQ, compressed-tensors or to FP8.

What a stored weight stands for is scale * (q - zero). It is packed as our products take it where
that loses nothing (`inferlab.kernels.pack_rounded`), else made dense, in fp32, rounded once to the
model's dtype; inputs of dense products are not rounded, also where a checkpoint's own engine would.
The packages that made them are not needed. Layouts, as their makers document and write them:

* ``gptq`` (AutoGPTQ, GPTQModel): ``qweight`` [in * bits / 32, out] int32, a stream of bits along
  the inputs, lowest first; ``qzeros`` [groups, out * bits / 32], which hold zero - 1 unless
  ``checkpoint_format`` is "gptq_v2"; ``scales`` [groups, out]; ``g_idx`` [in], an input's group.
* ``awq`` (AutoAWQ, version "gemm"): ``qweight`` [in, out / 8] and ``qzeros`` [groups, out / 8], of
  whose eight outputs an int32 holds 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits up; ``scales``
  [groups, out].
* ``compressed-tensors``: ``weight_packed`` [out, in / n] with n = 32 // bits numbers an int32, or
  ``weight`` as int8 or float8; ``weight_scale``, of the whole, of outputs, groups or blocks;
  ``weight_zero_point`` (packed along the outputs, where it is int32), ``weight_g_idx``.
* ``fp8`` (transformers', DeepSeek's): ``weight`` as float8 and ``weight_scale_inv``, of blocks of
  ``weight_block_size`` (128 x 128) or of the whole; ``fbgemm_fp8``: ``weight_scale`` of outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from inferlab.kernels import PackedWeight, pack_rounded

Settings = Mapping[str, Any]
Parts = Mapping[str, torch.Tensor]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each half byte of an int32 is of, lowest bits first."""


class UnknownLayoutError(ValueError):
    """Weights in a layout that is not read here; the message names it."""


def rounded_by(config: Any) -> Settings | None:
    """What a model's config says of weights that are read here; None: nothing, or another method.

    Raises:
        UnknownLayoutError: a known method, in a form of its own.
    """
    said = getattr(config, "quantization_config", None)
    said = said if isinstance(said, Mapping) else getattr(said, "to_dict", dict)()
    method = said.get("quant_method")
    if method not in METHODS:
        return None
    form, known = {
        "gptq": (said.get("checkpoint_format") or "gptq", ("gptq", "gptq_v2")),
        "awq": (str(said.get("version") or "gemm").lower(), ("gemm",)),
    }.get(method, ("", ("",)))
    if form not in known:
        raise UnknownLayoutError(
            f"its {method} weights are in the layout {form!r}; read are {' and '.join(known)}"
        )
    if method == "compressed-tensors":
        if (said.get("sparsity_config") or {}).get("format") not in (None, "dense"):
            raise UnknownLayoutError("its compressed-tensors weights are sparse, not dense")
        if (said.get("transform_config") or {}).get("config_groups"):
            raise UnknownLayoutError("its compressed-tensors weights are behind transforms")
    return said


class Rounded(NamedTuple):
    """A weight [out, in] as ``scales * (q - zeros)``.

    Attributes:
        q: [out, in], whole numbers from 0 to 2**bits - 1.
        zeros, scales: [out, S], of groups of inputs.
        group_of: [in], the group of each input; None: all are as long, in order.
    """

    q: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    bits: int
    group_of: torch.Tensor | None = None

    def dense(self) -> torch.Tensor:
        """[out, in] fp32"""
        if self.group_of is not None:
            group_of = self.group_of.long()
            return self.scales.float()[:, group_of] * (self.q - self.zeros[:, group_of])
        by_group = self.q.float().unflatten(1, (self.scales.shape[1], -1))
        return by_group.sub_(self.zeros[:, :, None]).mul_(self.scales[:, :, None]).flatten(1)

    def packed(self) -> PackedWeight | None:
        """As our products take it; None where that would lose something."""
        if self.group_of is None:
            return pack_rounded(self.q, self.zeros, self.scales, self.bits)
        order = torch.argsort(self.group_of, stable=True)
        size = len(order) // self.scales.shape[1]
        if _out_of_order(self.group_of[order], self.scales.shape[1]) is not None or size == 0:
            return None
        packed = pack_rounded(self.q[:, order], self.zeros, self.scales, self.bits)
        return None if packed is None else packed._replace(order=order.int())


class Dense(NamedTuple):
    """A weight [out, in] that is no such product, fp32."""

    weight: torch.Tensor

    def dense(self) -> torch.Tensor:
        """[out, in] fp32"""
        return self.weight

    def packed(self) -> None:
        """As our products take it: not."""


Read = tuple[Rounded | Dense, Iterator[str]]
"""A module's weight, and which of its parts are no part of it."""


class Weights(NamedTuple):
    """Those of a checkpoint, by name; of packed ones ``MODULE.data`` and ``MODULE.order``.

    Attributes:
        packed: by module, without the bytes.
    """

    tensors: dict[str, torch.Tensor]
    packed: dict[str, PackedWeight]


def read_weights(
    files: Sequence[Path], settings: Settings, dtype: torch.dtype, packable: Container[str] = ()
) -> Weights:
    """All weights of a checkpoint, packed or dense.

    Args:
        files: safetensors.
        settings: of `rounded_by`.
        dtype: of the dense ones that were rounded; all others are as they are stored.
        packable: modules whose weights are packed, where that loses nothing.

    Raises:
        UnknownLayoutError: a weight that cannot be read; names it.
    """
    ends, read = METHODS[settings["quant_method"]]
    found = Weights({}, {})
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        where = {name: file for file in opened for name in file.keys()}  # noqa: SIM118
        groups: dict[str, dict[str, str]] = {}
        for name in where:
            module, _, part = name.rpartition(".")
            groups.setdefault(module, {})[part] = name
        for module, names in groups.items():
            parts = {part: where[name].get_tensor(name) for part, name in names.items()}
            if any(end in names for end in ends):
                try:
                    weight, rest = read(parts, settings)
                    packed = weight.packed() if module in packable else None
                    if packed is None:
                        stored = {"weight": weight.dense().to(dtype).contiguous()}
                except KeyError as error:
                    raise UnknownLayoutError(f"{module} has no {error.args[0]}") from error
                except (RuntimeError, ValueError, IndexError) as error:
                    raise UnknownLayoutError(f"{module}: {error}") from error
                if packed is not None:
                    stored = {"data": packed.data}
                    if packed.order is not None:
                        stored["order"] = packed.order
                    found.packed[module] = packed._replace(data=packed.data.new_empty(0))
                parts = stored | {part: parts[part] for part in rest}
            for part, tensor in parts.items():
                found.tensors[f"{module}.{part}" if module else part] = tensor
    return found


def _gptq(parts: Parts, settings: Settings) -> Read:
    packed, scales, zeros = parts["qweight"], parts["scales"], parts["qzeros"]
    group_of = parts.get("g_idx")
    if group_of is not None and group_of.numel() == 0:
        group_of = None
    _check_groups(group_of, "g_idx")
    if group_of is None:
        size = settings.get("group_size", -1)
        inputs = len(scales) * size if size > 0 else len(packed) * 32 // settings["bits"]
    else:
        inputs = len(group_of)
    bits = len(packed) * 32 // inputs  # modules may differ
    zero = _bits_of(zeros, bits)[:, : scales.shape[1]]
    if (settings.get("checkpoint_format") or "gptq") == "gptq":
        zero = (zero + 1) & (2**bits - 1)
    q = _bits_of(packed, bits, dim=0)
    weight = Rounded(q.t(), zero.t(), scales.t(), bits, _out_of_order(group_of, len(scales)))
    return weight, _others(parts, "qweight", "qzeros", "scales", "g_idx")


def _awq(parts: Parts, settings: Settings) -> Read:
    scales = parts["scales"]
    zero = _awq_order(parts["qzeros"]) if "qzeros" in parts else torch.full_like(scales, 8)
    weight = Rounded(_awq_order(parts["qweight"]).t(), zero.t(), scales.t(), 4)
    return weight, _others(parts, "qweight", "qzeros", "scales")


def _out_of_order(group_of: torch.Tensor | None, groups: int) -> torch.Tensor | None:
    """The group of each input, unless they are of equal length and in order."""
    if group_of is None:
        return None
    inputs = len(group_of)
    in_order = torch.arange(inputs) * groups // inputs
    even = inputs % groups == 0 and torch.equal(group_of.long(), in_order)
    return None if even else group_of


def _check_groups(group_of: torch.Tensor | None, part: str) -> None:
    if group_of is not None and (group_of.dim() != 1 or bool((group_of < 0).any())):
        raise ValueError(f"{part} must be the group of each input, from 0 on")


def _awq_order(packed: torch.Tensor) -> torch.Tensor:
    """[n, out / 8] int32 -> [n, out]"""
    halves = _bits_of(packed, 4).view(len(packed), -1, 8)
    ordered = torch.empty_like(halves)
    ordered[:, :, list(AWQ_ORDER)] = halves
    return ordered.flatten(1)


def _compressed(parts: Parts, settings: Settings) -> Read:
    scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
    rest = (
        part for part in parts
        if part == "bias" or not part.startswith(("weight", "input_", "output_"))
    )  # fmt: skip
    if "weight_packed" in parts:
        packed = parts["weight_packed"]
        if packed.dtype != torch.int32:
            raise ValueError(f"weight_packed has dtype {packed.dtype}, which is not read here")
        rows, columns = (int(size) for size in parts["weight_shape"])
        bits = _bits_by_width(columns, packed.shape[1])
        stored = _whole_bits_of(packed, bits)[:rows, :columns] - 2 ** (bits - 1)
        if zero is not None and zero.dtype == torch.int32 and len(zero) != rows:
            zero = _whole_bits_of(zero.t(), bits).t()[:rows] - 2 ** (bits - 1)
    else:
        stored, bits = parts["weight"], 8
    group_of = parts.get("weight_g_idx")
    if group_of is not None and bool((group_of == -1).all()):  # as it is made before it is told
        group_of = None
    _check_groups(group_of, "weight_g_idx")
    if group_of is not None:
        group_of = _out_of_order(group_of, 1 if scale.dim() < 2 else scale.shape[1])
    else:
        rows, columns = _block(settings, stored.shape, scale.shape)
        groups = -(-stored.shape[1] // columns)
        if rows > 1 or stored.is_floating_point():
            over = _spread(scale, stored.shape, (rows, columns))
            shift = 0.0 if zero is None else _spread(zero, stored.shape, (rows, columns))
            return Dense(over * (stored.float() - shift)), rest
        if stored.shape[1] % groups:
            group_of = torch.arange(stored.shape[1]) // columns
    middle = 2 ** (bits - 1)
    zeros = torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero.int()
    scale, zeros = (of.reshape(len(of), -1) for of in (scale, zeros))
    return Rounded(stored.int() + middle, zeros + middle, scale, bits, group_of), rest


def _block(settings: Settings, shape: Sequence[int], of: Sequence[int]) -> tuple[int, int]:
    """Rows and columns that share a scale, of so many scales."""
    groups = (settings.get("config_groups") or {}).values()
    rules = [rule.get("weights") or {} for rule in groups]
    sizes = {rule["group_size"] for rule in rules if (rule.get("group_size") or -1) > 0}
    blocks = {tuple(rule["block_structure"]) for rule in rules if rule.get("block_structure")}
    for rows, columns in (*blocks, *((1, size) for size in sizes)):
        if (-(-shape[0] // rows), -(-shape[1] // columns)) == tuple(of):
            return rows, columns
    counts = (*of, 1, 1)[:2]
    if shape[0] % counts[0] or shape[1] % counts[1]:
        raise ValueError(f"{list(of)} scales of a weight {list(shape)} are not read here")
    return shape[0] // counts[0], shape[1] // counts[1]


def _fp8(parts: Parts, settings: Settings) -> Read:
    scale = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    values = parts["weight"].float()
    rows, columns = settings.get("weight_block_size") or (128, 128)
    if scale.dim() and len(scale) == len(values):
        rows, columns = 1, values.shape[1]
    weight = values * _spread(scale, values.shape, (rows, columns))
    used = ("weight", "weight_scale", "weight_scale_inv", "input_scale", "activation_scale")
    return Dense(weight), _others(parts, *used)


def _spread(scale: torch.Tensor, shape: Sequence[int], block: tuple[int, int]) -> torch.Tensor:
    """A number for each element of a weight, of numbers for blocks of it, outputs, or all."""
    wide = scale.float()
    if wide.numel() == 1:
        return wide.reshape(1, 1)
    if wide.dim() == 1:
        wide = wide[:, None]
    wide = wide.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    if wide.shape[0] < shape[0] or wide.shape[1] < shape[1]:
        raise ValueError(f"{list(scale.shape)} scales are too few for a weight {list(shape)}")
    return wide[: shape[0], : shape[1]]


def _bits_of(packed: torch.Tensor, bits: int, dim: int = 1) -> torch.Tensor:
    """The numbers of a stream of bits along ``dim``: [n, m] int32 -> [n, 32 m / bits]. Those of 3
    bits go from one int32 into the next."""
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"weights of {bits} bits are not read here")
    if bits != 3:
        return _whole_bits_of(packed, bits, dim)
    stream = _whole_bits_of(packed, 1, dim).unflatten(dim, (-1, bits))
    return (stream << _along(torch.arange(bits), dim)).sum(dim + 1, dtype=torch.int32)


def _whole_bits_of(packed: torch.Tensor, bits: int, dim: int = 1) -> torch.Tensor:
    """Numbers that lie within an int32 each: [n, m] int32 -> [n, m (32 // bits)]."""
    places = _along(torch.arange(0, 32 // bits * bits, bits), dim)
    return (packed.unsqueeze(dim + 1) >> places & (2**bits - 1)).flatten(dim, dim + 1)


def _along(numbers: torch.Tensor, dim: int) -> torch.Tensor:
    """int32, for the dimension behind ``dim`` of a matrix."""
    return numbers.int().view(-1, *[1] * (1 - dim))


def _bits_by_width(numbers: int, words: int) -> int:
    """Of how many bits so many numbers are that take so many int32."""
    for bits in (4, 8, 2, 3, 5, 6, 7):
        if -(-numbers // (32 // bits)) == words:
            return bits
    raise ValueError(f"{numbers} numbers in {words} int32 are not read here")


def _others(parts: Parts, *used: str) -> Iterator[str]:
    return (part for part in parts if part not in used)


METHODS: dict[str, tuple[tuple[str, ...], Callable[[Parts, Settings], Read]]] = {
    "gptq": (("qweight",), _gptq),
    "awq": (("qweight",), _awq),
    "compressed-tensors": (("weight_scale",), _compressed),
    "fp8": (("weight_scale_inv", "weight_scale"), _fp8),
    "fbgemm_fp8": (("weight_scale",), _fp8),
}
"""What is read: the parts by which a rounded weight is known, and how it is read."""
