"""Mixtures of experts with packed weights: `QuantizedExperts` in place of a family's own module.

transformers keeps the experts of a layer as two stacks of weights, no linear modules. To be packed
they are taken apart (`SplitExperts`), so that what packs linear modules, and measures what these
are given, finds each expert's two; then they are stacked again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from inferlab.kernels import PackedWeight, packed_linear


def is_experts(module: nn.Module) -> bool:
    """Whether a module is nothing but gated experts, as transformers' own implementations for all
    families (``integrations/moe.py``) take them: gate and up of each in one weight [E, 2 I, H],
    down in another [E, H, I], no biases."""
    if getattr(module, "is_transposed", None) is not False or module.has_bias:
        return False
    if not getattr(module, "has_gate", True) or not getattr(module, "is_concatenated", True):
        return False
    if getattr(module, "has_post_expert_norm", False):
        return False
    gating = getattr(type(module), "_apply_gate", None)
    if gating is not None and gating.__module__ != "transformers.integrations.moe":
        return False
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(up, nn.Parameter) or not isinstance(down, nn.Parameter) or up.dim() != 3:
        return False
    count, twice, hidden = up.shape
    return down.shape == (count, hidden, twice // 2) and hasattr(module, "act_fn")


class SplitExperts(nn.Module):
    """Experts as linear modules, whose weights are views of ``source``'s.

    Attributes:
        num_experts: E.
        act_fn: of the gates.
        gate_up, down: a linear module for each expert, or what has been put in its place.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.num_experts: int = source.gate_up_proj.shape[0]
        self.act_fn = source.act_fn
        self.gate_up = nn.ModuleList(map(_linear, source.gate_up_proj))
        self.down = nn.ModuleList(map(_linear, source.down_proj))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """See `mix`."""

        def expert(number: int, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.gate_up[number](x).chunk(2, dim=-1)
            said: torch.Tensor = self.down[number](self.act_fn(gate) * up)
            return said

        return mix(expert, self.num_experts, hidden_states, top_k_index, top_k_weights)


class QuantizedExperts(nn.Module):
    """Experts with packed weights, on a CPU.

    Args:
        split: experts of which all linear modules are packed.

    Attributes:
        num_experts, act_fn: as they were.
        gate_up_data, down_data: [E, tiles, bytes] uint8, buffers: `PackedWeight.data` of each.
        num_parameters: of all weights.
    """

    gate_up_data: torch.Tensor
    down_data: torch.Tensor

    def __init__(self, split: SplitExperts) -> None:
        super().__init__()
        self.num_experts, self.act_fn = split.num_experts, split.act_fn
        up: list[Any] = list(split.gate_up)
        down: list[Any] = list(split.down)
        self._sizes = tuple(each[0].packed._replace(data=None) for each in (up, down))
        self.num_parameters: int = sum(each.num_parameters for each in (*up, *down))
        self.register_buffer("gate_up_data", torch.stack([each.data for each in up]))
        self.register_buffer("down_data", torch.stack([each.data for each in down]))

    @property
    def gate_up(self) -> PackedWeight:
        """Of all experts, one after the other: ``data`` is [E, tiles, bytes]."""
        return self._sizes[0]._replace(data=self.gate_up_data)

    @property
    def down(self) -> PackedWeight:
        """The same of what leads back."""
        return self._sizes[1]._replace(data=self.down_data)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """See `mix`."""
        gate_up, down = self.gate_up, self.down

        def expert(number: int, x: torch.Tensor) -> torch.Tensor:
            both: torch.Tensor = packed_linear(x, gate_up._replace(data=gate_up.data[number]))
            gate, up = both.chunk(2, dim=-1)
            x = self.act_fn(gate) * up
            said: torch.Tensor = packed_linear(x, down._replace(data=down.data[number]))
            return said

        return mix(expert, self.num_experts, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        up, down = self._sizes
        return f"{self.num_experts} of {up.in_features} x {down.in_features}, bits={up.bits}"


def mix(
    expert: Callable[[int, torch.Tensor], torch.Tensor],
    num_experts: int,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What rows get of their experts, who are added in the order of their numbers.

    Args:
        expert: from a number and rows [r, H] to what it makes of them.
        num_experts: E; this number in ``top_k_index`` stands for none.
        hidden_states: [R, H].
        top_k_index, top_k_weights: [R, k], the experts of each row and their weights.
    """
    out = torch.zeros_like(hidden_states)
    for number in top_k_index.unique().tolist():
        if number == num_experts:
            continue
        rows, slots = torch.where(top_k_index == number)
        said = expert(number, hidden_states[rows]) * top_k_weights[rows, slots, None]
        out.index_add_(0, rows, said.to(out.dtype))
    return out


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A module of a weight [out, in], and nothing else made."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear
