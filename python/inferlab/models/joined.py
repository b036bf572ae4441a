"""Projections of one input as one product: one weight, of which theirs are views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from inferlab.kernels import PackedWeight
from inferlab.kernels.packed_weight import OUTPUTS as PACKED_OUTPUTS
from inferlab.models.quantized import QuantizedLinear


def join(*linears: Any) -> tuple[torch.Tensor | PackedWeight, torch.Tensor | None]:
    """One weight [sum of outputs, inputs] for linears of one input; they become views of it."""
    bias = join_biases(linears)
    if isinstance(linears[0], QuantizedLinear):
        return join_packed(linears), bias
    weight = torch.cat([each.weight.detach() for each in linears])
    start = 0
    for each in linears:
        end = start + each.weight.shape[0]
        each.weight = nn.Parameter(weight[start:end], requires_grad=False)
        start = end
    return weight, bias


def join_biases(linears: Sequence[Any]) -> torch.Tensor | None:
    """The same of their biases."""
    if linears[0].bias is None:
        return None
    bias = torch.cat([each.bias.detach() for each in linears])
    start = 0
    for each in linears:
        end = start + len(each.bias)
        each.bias = nn.Parameter(bias[start:end], requires_grad=False)
        start = end
    return bias


def join_packed(linears: Sequence[QuantizedLinear]) -> PackedWeight:
    """The same of packed weights, all but the last of whole tiles (`can_join`)."""
    joint = torch.cat([each.data for each in linears])
    start = 0
    for each in linears:
        each.data = joint[start : start + len(each.data)]
        start += len(each.data)
    outputs = sum(each.out_features for each in linears)
    return linears[0].packed._replace(data=joint, out_features=outputs)


def can_join(linears: Sequence[Any]) -> bool:
    """Whether linears of one input have one form, and can be one product."""
    first = linears[0]
    if len({(type(each), each.bias is None) for each in linears}) > 1:
        return False
    if not isinstance(first, QuantizedLinear):
        return True
    whole = all(each.out_features % PACKED_OUTPUTS == 0 for each in linears[:-1])
    return whole and len({_form(each) for each in linears}) == 1


def _form(linear: QuantizedLinear) -> tuple[Any, ...]:
    order = None if linear.order is None else tuple(linear.order.tolist())
    return linear.bits, linear.group, linear.zeros, order
