"""Products of a model's own modules on a CPU, with the same bits for a row in any company.

BLAS sums in another order for every number of rows, so that a token could depend on what is
verified or batched beside it. `kernels.linear` does not; inside `StableProducts` torch's linear
layers, and GPT-2's transposed ones, go there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from inferlab.kernels import linear

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class StableProducts(TorchFunctionMode):
    """A context for forwards of one model.

    What it cannot do the same way stays torch's: weights that are quantised or not in one piece,
    batched products of experts; and activations, whose last elements torch computes by another
    function than the others where a row is not a multiple of 64.
    """

    def __init__(self) -> None:
        super().__init__()
        self._turned = WeakIdKeyDictionary()  # weight [in, out] -> (version, weight [out, in])

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = None
        if func is torch.nn.functional.linear:
            out = _linear(*args, **(kwargs or {}))
        elif func is torch.addmm and len(args) == 3 and not kwargs:
            out = self._addmm(*args)
        return func(*args, **(kwargs or {})) if out is None else out

    def _addmm(
        self, bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor | None:
        """GPT-2's Conv1D: ``bias + x @ weight``; the weight is turned once, and kept."""
        if bias.dim() != 1 or not isinstance(weight, torch.nn.Parameter):
            return None
        now = 0 if weight.is_inference() else weight._version
        version, turned = self._turned.get(weight, (None, None))
        if version != now:
            turned = weight.detach().t().contiguous()
            self._turned[weight] = now, turned
        return _linear(x, turned, bias)


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The product by our kernel, or None where it does not take these."""
    plain = input.is_cpu and weight.is_cpu and input.dtype in _DTYPES and weight.dim() == 2
    if not plain or weight.dtype != input.dtype or not weight.is_contiguous():
        return None
    if input.numel() == 0 or (bias is not None and not bias.is_contiguous()):
        return None
    rows = input.reshape(-1, input.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return linear(rows, weight, bias).view(*input.shape[:-1], weight.shape[0])
