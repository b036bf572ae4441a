"""Models whose products have weights of 8 or 4 bits: `QuantizedLinear` in place of linear modules.

A quantised target is a target of its own: speculation is exact against its own plain decoding.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from inferlab.kernels import PackedWeight, pack, packed_linear, unpack

FORMATS: dict[str, tuple[int, int]] = {"int8": (8, 64), "int4": (4, 32)}
"""Bits of a weight, and how many inputs are rounded together."""
HEAD_FORMAT = "int8"  # what 4 bits leave of an output head is too little


class QuantizedLinear(nn.Module):
    """``x @ weight.T + bias`` with a packed weight; made of an ``nn.Linear``, or of a ``Conv1D``,
    which GPT-2 calls the same with a transposed weight, on a CPU.

    Attributes:
        data: the packed weight's bytes, a buffer.
        bias: as it was, or None.
        num_parameters: of the weight.
    """

    data: torch.Tensor
    like: torch.Tensor

    def __init__(self, source: nn.Linear | Conv1D, quantization: str) -> None:
        super().__init__()
        bits, group = FORMATS[quantization]
        packed = pack(source.weight.t() if type(source) is Conv1D else source.weight, bits, group)
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self.bits, self.group = bits, group
        self.num_parameters = source.weight.numel()
        self.register_buffer("data", packed.data)
        # What `half`, `to` and the like make of it is the dtype of the rest.
        self.register_buffer("like", source.weight.detach().new_empty(0), persistent=False)
        self.bias = source.bias

    @property
    def packed(self) -> PackedWeight:
        """What `kernels.packed_linear` takes."""
        sizes = self.out_features, self.in_features
        return PackedWeight(self.data, self.bits, self.group, *sizes)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in] in the model's dtype, unpacked at every call."""
        most = torch.finfo(self.like.dtype).max
        return unpack(self.packed).clamp_(-most, most).to(self.like.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = packed_linear(rows, self.packed, self.bias)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def quantize(model: PreTrainedModel, quantization: str) -> None:
    """Packs the weights of all linear modules in place, one after the other.

    The embedding stays as it is; an output head that shares its weight gets one of its own, which
    has 8 bits in every format.

    Raises:
        ValueError: an unknown format; a model that is not on a CPU, is packed already, has no
            linear modules, or has weights that are no numbers. It is as it was then.
    """
    check_format(quantization, model.device)
    if known := getattr(model, "inferlab_quantization", None):
        raise ValueError(f"quantization is {quantization!r}, but the model is {known} already")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in (nn.Linear, Conv1D)
    ]
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and not bool(module.weight.isfinite().all()):
            raise ValueError(
                f"{name} has weights that are NaN or infinite; they cannot be rounded to "
                f"{quantization}: mend the checkpoint, or leave quantization out"
            )
    if not found:
        raise ValueError(
            f"quantization is {quantization!r}, but {type(model).__name__} has no linear modules "
            "to be packed; leave it out"
        )
    uses = Counter(id(weight) for weight in (embedding.weight, *(c.weight for *_, c in found)))
    while found:  # and each weight is let go of when it is packed
        parent, name, child = found.pop()
        packed = QuantizedLinear(child, HEAD_FORMAT if child is head else quantization)
        uses[id(child.weight)] -= 1
        if uses[id(child.weight)] > 0:
            packed.num_parameters = 0  # they are the embedding's, or another module's
        setattr(parent, name, packed)
    model.config.tie_word_embeddings = False  # the head has a weight of its own now
    model.inferlab_quantization = quantization


def check_format(quantization: str, device: torch.device) -> None:
    """Whether models on a device can be packed like that.

    Raises:
        ValueError: they cannot.
    """
    if quantization not in FORMATS:
        formats = " or ".join(map(repr, FORMATS))
        raise ValueError(f"quantization is {quantization!r}; it must be {formats}")
    if device.type != "cpu":
        raise ValueError(
            f"quantization is {quantization!r}, which is of CPUs, and the model is on {device}; "
            "choose device 'cpu', or leave quantization out"
        )


def weight_of(linear: Any) -> torch.Tensor | PackedWeight:
    """A linear module's weight as products take it."""
    if isinstance(linear, QuantizedLinear):
        return linear.packed
    weight: torch.Tensor = linear.weight.detach()
    return weight


def num_parameters(model: nn.Module) -> int:
    """Numbers that a model has learnt, in whatever format."""
    packed = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    return sum(p.numel() for p in model.parameters()) + sum(m.num_parameters for m in packed)
