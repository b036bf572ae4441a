"""Tiny models in the layouts of GPTQ, AWQ, compressed-tensors and FP8, written number by number."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.tiny_models import tiny_model, tiny_tokenizer

GROUP = 16
WIDE = 32  # groups of our products
Tensors = dict[str, torch.Tensor]
Written = tuple[Tensors, torch.Tensor]
"""The parts of a module as they are stored, and the fp32 weight that they stand for."""


def words(numbers: Sequence[int], bits: int) -> list[int]:
    """A stream of bits as int32, each number's lowest bit first."""
    stream = sum(number << place * bits for place, number in enumerate(numbers))
    return [signed(stream >> start & 0xFFFFFFFF) for start in range(0, len(numbers) * bits, 32)]


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def int32(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def random_parts(
    outputs: int, groups: int, inputs: int, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [out, in] and zeros [out, groups], both from 0 on, and scales [out, groups] fp16."""
    q = torch.randint(0, 2**bits, (outputs, inputs))
    zeros = torch.randint(1, 2**bits, (outputs, groups))
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    return q, zeros, (torch.rand(outputs, groups) * 0.02 + 0.001).half()


def shuffled(inputs: int) -> torch.Tensor:
    """An order of inputs, the same for all modules that have so many."""
    return torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))


def gptq(
    bits: int,
    *,
    v2: bool = False,
    ordered: bool = True,
    symmetric: bool = False,
    group: int = GROUP,
) -> Layout:
    def write(weight: torch.Tensor) -> Written:
        outputs, inputs = weight.shape
        groups = inputs // group
        q, zeros, scales = random_parts(outputs, groups, inputs, bits, symmetric)
        group_of = torch.arange(inputs) // group
        if not ordered:
            group_of = group_of[shuffled(inputs)]
        stored = zeros if v2 else (zeros - 1) % 2**bits
        parts = {
            "qweight": int32([words(row, bits) for row in q.tolist()]).t().contiguous(),
            "qzeros": int32([words(row, bits) for row in stored.t().tolist()]),
            "scales": scales.t().contiguous(),
            "g_idx": group_of.int(),
        }
        return parts, scales.float()[:, group_of] * (q - zeros[:, group_of])

    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": not ordered}
    return write, settings | ({"checkpoint_format": "gptq_v2"} if v2 else {})


def awq(group: int = GROUP) -> Layout:
    def write(weight: torch.Tensor) -> Written:
        outputs, inputs = weight.shape
        q, zeros, scales = random_parts(outputs, inputs // group, inputs, 4, symmetric=False)

        def interleaved(row: list[int]) -> list[int]:
            order = (0, 2, 4, 6, 1, 3, 5, 7)
            return words([row[at + place] for at in range(0, len(row), 8) for place in order], 4)

        parts = {
            "qweight": int32([interleaved(row) for row in q.t().tolist()]),
            "qzeros": int32([interleaved(row) for row in zeros.t().tolist()]),
            "scales": scales.t().contiguous(),
        }
        spread = scales.float().repeat_interleave(group, 1)
        return parts, spread * (q - zeros.repeat_interleave(group, 1))

    return write, {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}


def compressed(
    bits: int,
    *,
    group: int | None,
    symmetric: bool,
    ordered: bool = True,
    dtype: torch.dtype = torch.float16,
) -> Layout:
    def write(weight: torch.Tensor) -> Written:
        outputs, inputs = weight.shape
        count = inputs // group if group else 1
        q, zeros, scales = random_parts(outputs, count, inputs, bits, symmetric)
        scales = scales.to(dtype)
        group_of = torch.arange(inputs) * count // inputs
        if not ordered:
            group_of = group_of[shuffled(inputs)]
        parts = {
            "weight_packed": int32([words(row, bits) for row in q.tolist()]),
            "weight_scale": scales,
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        if not ordered:
            parts["weight_g_idx"] = group_of.int()
        if not symmetric:  # packed along the outputs
            columns = [words(column, bits) for column in zeros.t().tolist()]
            parts["weight_zero_point"] = int32(columns).t().contiguous()
        return parts, scales.float()[:, group_of] * (q - zeros[:, group_of])

    more = {"symmetric": symmetric} | ({} if ordered else {"actorder": "group"})
    return write, compressed_settings("pack-quantized", bits, group, **more)


def compressed_settings(form: str, bits: int, group: int | None, **more: object) -> Settings:
    strategy = "block" if "block_structure" in more else "group" if group else "channel"
    rule = {"num_bits": bits, "strategy": strategy, "group_size": group, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": rule}},
    }


def whole_bytes(weight: torch.Tensor) -> Written:
    q = torch.randint(-128, 128, weight.shape)
    scales = torch.rand(len(weight), 1) * 0.002
    return {"weight": q.to(torch.int8), "weight_scale": scales}, scales * q


def float8(rows: int, columns: int, name: str) -> Callable[[torch.Tensor], Written]:
    """Scales of blocks, the last of which may be cut; 0 rows: one of the whole."""

    def write(weight: torch.Tensor) -> Written:
        values = (weight * 8).to(torch.float8_e4m3fn)
        outputs, inputs = weight.shape
        if not rows:
            scale = torch.rand(1) * 0.1
            return {"weight": values, name: scale}, values.float() * scale
        scales = torch.rand(-(-outputs // rows), -(-inputs // columns)) * 0.1
        down, along = torch.arange(outputs) // rows, torch.arange(inputs) // columns
        dense = values.float() * scales[down[:, None], along]
        return {"weight": values, name: scales}, dense

    return write


Settings = dict[str, object]
Layout = tuple[Callable[[torch.Tensor], Written], Settings]
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
LAYOUTS: dict[str, Layout] = {
    "gptq 2": gptq(2),
    "gptq 3": gptq(3),
    "gptq 4": gptq(4, symmetric=True),
    "gptq 4, zeros": gptq(4),
    "gptq 4, by activation": gptq(4, ordered=False),
    "gptq 8": gptq(8),
    "gptq v2": gptq(4, v2=True),
    "awq": awq(),
    "packed 4": compressed(4, group=GROUP, symmetric=True),
    "packed 4, zeros": compressed(4, group=GROUP, symmetric=False),
    "packed 4, by activation": compressed(4, group=GROUP, symmetric=True, ordered=False),
    "packed 8": compressed(8, group=None, symmetric=True),
    "int8": (whole_bytes, compressed_settings("int-quantized", 8, None)),
    "float8": (
        float8(1, 10**6, "weight_scale"),
        compressed_settings("float-quantized", 8, None, type="float"),
    ),
    "float8 of blocks": (
        float8(24, 20, "weight_scale"),
        compressed_settings("float-quantized", 8, None, type="float", block_structure=[24, 20]),
    ),
    "fp8": (float8(24, 20, "weight_scale_inv"), FP8 | {"weight_block_size": [24, 20]}),
    "fp8 of the whole": (float8(0, 0, "weight_scale_inv"), FP8),
    "fbgemm": (float8(1, 10**6, "weight_scale"), {"quant_method": "fbgemm_fp8"}),
}
PACKED: dict[str, tuple[Layout, tuple[int, int, bool]]] = {
    "gptq": (gptq(4, group=WIDE), (4, WIDE, True)),
    "gptq, by activation": (gptq(4, group=WIDE, ordered=False), (4, WIDE, True)),
    "gptq v2, symmetric": (gptq(4, v2=True, symmetric=True, group=WIDE), (4, WIDE, True)),
    "awq": (awq(WIDE), (4, WIDE, True)),
    "packed 4": (
        compressed(4, group=WIDE, symmetric=True, dtype=torch.bfloat16),
        (4, WIDE, False),
    ),
    "packed 4, zeros": (compressed(4, group=WIDE, symmetric=False), (4, WIDE, True)),
    "packed 4, by activation": (
        compressed(4, group=WIDE, symmetric=True, ordered=False, dtype=torch.bfloat16),
        (4, WIDE, False),
    ),
    "packed 4 of outputs": (compressed(4, group=None, symmetric=True), (4, 128, True)),
    "packed 8": (
        compressed(8, group=None, symmetric=True, dtype=torch.bfloat16),
        (8, 64, False),
    ),
}
"""Those that our products take as they are, and how: [bits, group, zeros]."""


def write_checkpoint(folder: Path, layout: str | Layout, family: str = "llama") -> Tensors:
    """A tiny model whose linear modules but the head are rounded; what its weights stand for."""
    write, settings = LAYOUTS[layout] if isinstance(layout, str) else layout
    model = tiny_model(family)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    dense = dict(stored)
    torch.manual_seed(5)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            del stored[f"{name}.weight"]
            parts, dense[f"{name}.weight"] = write(module.weight.detach())
            stored |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    set_config(folder, settings)
    return dense


def set_config(folder: Path, settings: Settings) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
