"""Products of a model's own modules on a CPU, with the same bits for a row in any company.

BLAS sums in another order for every number of rows, so that a token could depend on what is
verified or batched beside it. `kernels.linear` does not; inside `StableProducts` torch's linear
layers, and GPT-2's transposed ones, go there. It reads weights as [out, in]; GPT-2 keeps [in, out].
No copy could follow what is written to a weight behind torch's back (through ``.data``, by NumPy,
by PEFT when it merges an adapter), so there is none: `turn` lays the weight itself out the other
way round, and a parameter with a layout of its own is turned anew for each product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from inferlab.kernels import linear
from inferlab.models.untouched import is_plain

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# Torch computes these a vector at a time, and what is left over at the end of a thread's share by
# another function, whose last bit may differ.
_F = torch.nn.functional
_BY_VECTORS = {_F.gelu, _F.silu, _F.mish, _F.softplus}
_BY_VECTORS |= {
    getattr(o, f) for o in (torch, torch.Tensor) for f in ("tanh", "sigmoid", "erf", "exp")
}
_VECTOR = 64  # elements, at least as many as any instruction set's vectors hold
_SHARE = 32768 - _VECTOR  # elements that torch leaves to one thread


class StableProducts(TorchFunctionMode):
    """A context for forwards of one model.

    What it cannot do the same way stays torch's: weights that are quantised or not in one piece,
    and products of all experts at once (see `experts_implementation`).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = None
        if func is torch.nn.functional.linear:
            out = _linear(*args, **(kwargs or {}))
        elif func is torch.addmm and len(args) == 3 and not kwargs:
            out = _addmm(*args)
        elif func in _BY_VECTORS and len(args) == 1:
            out = _by_whole_vectors(func, args[0], kwargs or {})
        return func(*args, **(kwargs or {})) if out is None else out


@torch.inference_mode(False)
def turn(model: nn.Module) -> None:
    """Lays the weights [in, out] of a model's `Conv1D` out as [out, in] in memory.

    Shape, values and the parameter stay what they are; only the strides change.
    """
    for module in model.modules():
        if not isinstance(module, Conv1D) or not isinstance(module.weight, nn.Parameter):
            continue
        weight = module.weight
        ours = weight.is_cpu and weight.dtype in _DTYPES
        if not ours or weight.data.t().is_contiguous():
            continue
        turned = weight.data.t().contiguous().t()
        if weight.is_inference():  # which cannot be given other data
            module.weight = nn.Parameter(turned, requires_grad=False)
        else:
            weight.data = turned


def experts_implementation(model: PreTrainedModel) -> Any:
    """How transformers computes the experts of a model, for ``set_experts_implementation``; None
    where there are none.

    "eager" goes from expert to expert by linear layers that `StableProducts` takes; the others
    multiply all of them at once.
    """
    can_set = getattr(model, "_can_set_experts_implementation", lambda: False)
    return model.get_experts_implementation() if can_set() else None


def _by_whole_vectors(func: Any, x: Any, options: dict[str, Any]) -> torch.Tensor | None:
    """An activation in shares of whole vectors, or None where torch does it so by itself."""
    if not isinstance(x, torch.Tensor) or not x.is_cpu or x.dtype not in _DTYPES or x.numel() == 0:
        return None
    if options.get("inplace") or (x.shape[-1] % _VECTOR == 0 and x.numel() <= _SHARE):
        return None
    rows = x.reshape(-1, x.shape[-1])
    missing = -rows.shape[1] % _VECTOR
    flat = torch.nn.functional.pad(rows, (0, missing)).view(-1) if missing else rows.reshape(-1)
    out = torch.cat([func(share, **options) for share in flat.split(_SHARE)])
    return out.view(len(rows), -1)[:, : rows.shape[1]].reshape(x.shape)


def _addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """GPT-2's Conv1D: ``bias + x @ weight``."""
    return _linear(x, weight.t().contiguous(), bias) if bias.dim() == 1 else None


def _linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The product by our kernel, or None where it does not take these."""
    plain = input.is_cpu and weight.is_cpu and input.dtype in _DTYPES and weight.dim() == 2
    if not plain or weight.dtype != input.dtype or not is_plain(weight):
        return None
    if not weight.is_contiguous():
        return None
    if input.numel() == 0 or (bias is not None and not bias.is_contiguous()):
        return None
    rows = input.reshape(-1, input.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return linear(rows, weight, bias).view(*input.shape[:-1], weight.shape[0])
