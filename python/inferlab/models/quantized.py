"""Models whose products have weights of 8 or 4 bits: `QuantizedLinear` in place of linear modules,
`QuantizedExperts` in place of experts.

A quantised target is a target of its own: speculation is exact against its own plain decoding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from inferlab.kernels import PackedWeight, pack, packed_linear, packed_sizes, unpack
from inferlab.models.experts import QuantizedExperts, SplitExperts, is_experts
from inferlab.models.linear_inputs import Inputs

FORMATS: dict[str, tuple[int, int]] = {"int8": (8, 64), "int4": (4, 32)}
"""Bits of a weight, and how many inputs are rounded together."""
Packing = tuple[int, int, bool, bool]
"""Bits, how many inputs are rounded together, whether groups have zeros of their own, and whether
inputs stand in another order."""
LINEARS = (nn.Linear, Conv1D)
"""Whose weights can be packed; as they are, no subclasses."""
DENSE = "dense"
"""In place of a format: weights that come rounded are not packed."""
HEAD_FORMAT = "int8"  # what 4 bits leave of an output head is too little


class QuantizedLinear(nn.Module):
    """``x @ weight.T + bias`` with a packed weight, on a CPU.

    Args:
        packed: the weight.
        bias: [out] or None.
        dtype: of the model.

    Attributes:
        data, order: the packed weight's, buffers.
        num_parameters: of the weight.
    """

    data: torch.Tensor
    order: torch.Tensor | None
    like: torch.Tensor

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self.bits, self.group, self.zeros = packed.bits, packed.group, packed.zeros
        self.num_parameters = packed.out_features * packed.in_features
        self.register_buffer("data", packed.data)
        self.register_buffer("order", packed.order)
        # What `half`, `to` and the like make of it is the dtype of the rest.
        like = torch.empty(0, dtype=dtype, device=packed.data.device)
        self.register_buffer("like", like, persistent=False)
        self.bias = bias

    @classmethod
    def of(
        cls, source: nn.Linear | Conv1D, quantization: str, moments: torch.Tensor | None = None
    ) -> QuantizedLinear:
        """Packs the weight of an ``nn.Linear``, or of a ``Conv1D``, which GPT-2 calls the same with
        a transposed weight; see `inferlab.kernels.pack`. On the meta device sizes alone."""
        weight = source.weight.t() if type(source) is Conv1D else source.weight
        bits, group = FORMATS[quantization]
        if weight.is_meta:
            return cls(packed_sizes(weight, bits, group), source.bias, weight.dtype)
        return cls(pack(weight, bits, group, moments), source.bias, weight.dtype)

    @property
    def packed(self) -> PackedWeight:
        """What `kernels.packed_linear` takes."""
        sizes = self.out_features, self.in_features
        return PackedWeight(self.data, self.bits, self.group, *sizes, self.zeros, self.order)

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


def quantize(
    model: PreTrainedModel,
    quantization: str,
    calibration: Sequence[Sequence[int]] = (),
    advance: Callable[[int], None] = lambda modules: None,
) -> None:
    """Packs the weights of all linear modules and experts in place, one after the other.

    The embedding stays as it is; an output head that shares its weight gets one of its own, which
    has 8 bits in every format.

    Args:
        quantization: of `FORMATS`.
        calibration: texts, token ids each. With them roundings make up for each other's errors on
            these texts; without, each weight is rounded to nearest.
        advance: called with the number of weights that were packed since it was called last.

    Raises:
        ValueError: an unknown format; a model that is not on a CPU, is packed already, has no
            linear modules, or has weights that are no numbers. It is as it was then.
    """
    check_format(quantization, model.device)
    if known := getattr(model, "inferlab_quantization", None):
        raise ValueError(f"quantization is {quantization!r}, but the model is {known} already")
    for name, module in model.named_modules():
        weights = _weights(module)
        if not all(bool(weight.isfinite().all()) for weight in weights):
            raise ValueError(
                f"{name} has weights that are NaN or infinite; they cannot be rounded to "
                f"{quantization}: mend the checkpoint, or leave quantization out"
            )
    inputs = Inputs(model, calibration) if calibration else None
    if not replace_linears(model, quantization, inputs, advance):
        raise ValueError(
            f"quantization is {quantization!r}, but {type(model).__name__} has no linear modules "
            "to be packed; leave it out"
        )


def replace_linears(
    model: PreTrainedModel,
    quantization: str,
    inputs: Inputs | None = None,
    advance: Callable[[int], None] = lambda modules: None,
) -> bool:
    """Puts a `QuantizedLinear` in the place of each linear module, and `QuantizedExperts` in that
    of experts; whether there were any."""
    split = _split_experts(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    places = _places(model, lambda module: type(module) in LINEARS)
    uses = Counter(id(weight) for weight in (embedding.weight, *(c.weight for c in places)))
    found = bool(places)
    for part in [list(places)] if inputs is None else inputs.in_parts(list(places)):
        moments = {} if inputs is None else inputs.moments(part)
        while part:  # each weight is let go of when it is packed
            child = part.pop()
            parent, name = places.pop(child)
            format_ = HEAD_FORMAT if child is head else quantization
            packed = QuantizedLinear.of(child, format_, moments.pop(child, None))
            uses[id(child.weight)] -= 1
            if uses[id(child.weight)] > 0:
                packed.num_parameters = 0  # they are the embedding's, or another module's
            setattr(parent, name, packed)
            del child  # the last view of its layer's experts
            advance(1)
    while split:
        parent, name, experts = split.pop()
        setattr(parent, name, QuantizedExperts(experts))
    if found:
        model.config.tie_word_embeddings = False  # the head has a weight of its own now
        model.inferlab_quantization = quantization
    return found


def place_packed(model: PreTrainedModel, packed: Mapping[str, Packing]) -> None:
    """Puts a `QuantizedLinear` that is not filled in the place of each linear module that is named.

    Raises:
        ValueError: a module that is not there, or is not linear.
    """
    modules = dict(model.named_modules())
    for name, packing in packed.items():
        linear = modules.get(name)
        if type(linear) is not nn.Linear:
            raise ValueError(f"{name} is packed, and {type(model).__name__} has no such linear")
        sizes = packed_sizes(linear.weight, *packing)
        model.set_submodule(name, QuantizedLinear(sizes, linear.bias, linear.weight.dtype))


def count_weights(model: nn.Module) -> int:
    """How many weights can be packed; of experts, each one's."""
    weights = (weight for module in model.modules() for weight in _weights(module))
    return sum(len(weight) if weight.dim() == 3 else 1 for weight in weights)


def _weights(module: Any) -> list[torch.Tensor]:
    """Those of a module itself that are to be packed."""
    if is_experts(module):
        return [module.gate_up_proj, module.down_proj]
    return [module.weight] if type(module) in LINEARS else []


def _places(
    model: nn.Module, wanted: Callable[[nn.Module], bool]
) -> dict[nn.Module, tuple[nn.Module, str]]:
    """Of the modules that are wanted: whose they are, and under what name."""
    return {
        child: (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if wanted(child)
    }


def _split_experts(model: nn.Module) -> list[tuple[nn.Module, str, SplitExperts]]:
    """Takes the experts of all layers apart: where they are, and what they are now."""
    split = []
    for child, (parent, name) in _places(model, is_experts).items():
        experts = SplitExperts(child)
        setattr(parent, name, experts)
        split.append((parent, name, experts))
    return split


def check_format(quantization: str, device: torch.device) -> None:
    """Whether models on a device can be packed like that.

    Raises:
        ValueError: they cannot.
    """
    if quantization not in FORMATS:
        formats = " or ".join(map(repr, FORMATS))
        raise ValueError(f"quantization is {quantization!r}; it must be {formats}")
    check_device(quantization, device)


def check_device(quantization: str, device: torch.device) -> None:
    """Whether packed weights can be multiplied with on a device.

    Raises:
        ValueError: they cannot.
    """
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
    if isinstance(model, PreTrainedModel) and getattr(model, "is_loaded_in_4bit", False):
        return int(model.num_parameters())  # which knows that they lie two to a byte
    kinds = QuantizedLinear, QuantizedExperts
    packed = (module for module in model.modules() if isinstance(module, kinds))
    return sum(p.numel() for p in model.parameters()) + sum(m.num_parameters for m in packed)
