"""Rotary frequencies that the length of a text decides: longrope and dynamic scaling.

transformers chooses such frequencies once per forward, by the largest position in it, so that a
long neighbour in the batch, a draft beyond the switch or a chunk of the prompt would change a
text's tokens. The rule here is what `generate` does with the text alone. It reads the prompt of P
tokens in one forward and every later token in one of its own: the node at position p is rotated as
a forward over max(P, p + 1) tokens rotates it. Cached keys keep the frequencies they were written
with. Only Phi-3 reads the whole text anew when it outgrows the short frequencies, see
`reread_length`.

All other kinds (default, linear, yarn, llama3, proportional; partial or not) know positions only
and run as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from inferlab.models.untouched import is_untouched

# Families whose `prepare_inputs_for_generation` drops the cache at the switch.
_REREADING = ("phi3", "phimoe")
_STRETCHING = ("linear", "dynamic", "yarn", "proportional")


class LengthRotary:
    """Rotates each node by the length of its own text, through a family's own rotary module.

    Args:
        module: one whose forward is transformers' `dynamic_rope_update` of the family's.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._bare = inspect.unwrap(type(module).forward)
        self._long: dict[str | None, Tensor] = {}
        for layer_type, kind in _kinds(module).items():
            if kind == "longrope":
                switch = _parameters(module, layer_type)["original_max_position_embeddings"]
                self._long[layer_type] = ROPE_INIT_FUNCTIONS[kind](
                    module.config,
                    _short(module, layer_type).device,
                    seq_len=switch + 1,
                    layer_type=layer_type,
                )[0]

    @classmethod
    def of(cls, module: nn.Module) -> LengthRotary | None:
        """None where lengths do not matter to this module, or are not seen to by transformers."""
        decides = any(_decides(kind) for kind in _kinds(module).values())
        return cls(module) if decides and hasattr(type(module).forward, "__wrapped__") else None

    @property
    def is_right(self) -> bool:
        """Whether it may stand in: for a forward that nobody changed, and gives the same as."""
        return is_untouched(self._module) and self.is_true()

    def __call__(
        self,
        x: Tensor,
        position_ids: Tensor,
        layer_type: str | None = None,
        *,
        prompt_lens: Tensor | None = None,
    ) -> Any:
        """What the module's forward returns, for positions [B, N] and ``prompt_lens`` [B]."""
        lengths = position_ids + 1
        if prompt_lens is not None:
            lengths = torch.maximum(lengths, prompt_lens.to(lengths.dtype)[:, None])
        kwargs = {} if layer_type is None else {"layer_type": layer_type}
        twin = copy.copy(self._module)  # the forward reads its frequencies from the module
        if _decides(_kinds(self._module).get(layer_type)):
            twin._buffers = dict(self._module._buffers)
            name = f"{_prefix(layer_type)}inv_freq"
            setattr(twin, name, self.frequencies(lengths.to(x.device), layer_type))
        return self._bare(twin, x, position_ids, **kwargs)

    def frequencies(self, lengths: Tensor, layer_type: str | None = None) -> Tensor:
        """Inverse frequencies [B, N, D / 2] for the text lengths [B, N] of nodes."""
        parameters = _parameters(self._module, layer_type)
        short = _short(self._module, layer_type).to(lengths.device)
        lengths = lengths[..., None]
        if layer_type in self._long:
            long = self._long[layer_type].to(lengths.device)
            switch = parameters["original_max_position_embeddings"]
            # A model that was cast keeps its frequencies in its own dtype.
            return torch.where(lengths > switch, long, short).to(short.dtype)
        # Dynamic NTK: the base grows with the length (transformers asks the device for it).
        limit = self._module.config.max_position_embeddings
        factor, dim = parameters["factor"], 2 * short.numel()
        growth = factor * lengths.clamp_min(limit) / limit - (factor - 1)
        base = parameters["rope_theta"] * growth ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, device=lengths.device).float() / dim
        return torch.where(lengths > limit, 1.0 / base**exponents, short)

    @property
    def switch(self) -> int:
        """The longest text that keeps the frequencies of short ones."""
        limits = [self._module.config.max_position_embeddings]
        limits += [
            _parameters(self._module, layer_type)["original_max_position_embeddings"]
            for layer_type in self._long
        ]
        return min(limits)

    @torch.no_grad()
    def is_true(self) -> bool:
        """Whether it gives what the module does, on either side of the switch.

        A family whose forward looks at the length once more (Phi-MoE scales by it) has others.
        """
        short = next(_short(self._module, layer_type) for layer_type in _kinds(self._module))
        x = torch.zeros(1, device=short.device)
        module = copy.deepcopy(self._module)  # short first: that resets what an earlier text left
        for last in (3, self.switch + 3):
            near = torch.tensor([[0, 1, 2]], device=short.device)  # rounding does not grow there
            far = torch.tensor([[0, 1, 2, last]], device=short.device)
            lengths = near.new_tensor([last + 1])
            for layer_type in _kinds(module):
                kwargs = {} if layer_type is None else {"layer_type": layer_type}
                theirs = _as_tuple(type(module).forward(module, x, far, **kwargs))
                ours = _as_tuple(self(x, near, **kwargs, prompt_lens=lengths))
                pairs = zip(ours, theirs, strict=True)
                if not all(torch.allclose(a, b[:, :3], atol=1e-4) for a, b in pairs):
                    return False
        return True

    @contextmanager
    def standing_in(self, prompt_lens: Tensor | None) -> Iterator[None]:
        """Lets the module rotate by this rule for the length of a ``with`` block."""
        own = self._module.__dict__.get("forward")

        def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
            return self(x, position_ids, layer_type, prompt_lens=prompt_lens)

        self._module.__dict__["forward"] = forward
        try:
            yield
        finally:
            if own is None:
                del self._module.__dict__["forward"]
            else:
                self._module.__dict__["forward"] = own


def length_rotary(model: nn.Module) -> LengthRotary | None:
    """That of a model's decoder, None where no frequency depends on a length."""
    for module in model.modules():
        rotary = LengthRotary.of(module)
        if rotary is not None:
            return rotary
    return None


def reread_length(config: Any) -> int | None:
    """The longest text whose K/V is of short frequencies, where `generate` then reads all anew.

    Phi-3 drops its cache once the text has outgrown the short frequencies: the forward for the
    token behind this length reads the whole text, with the long ones. None: no such family.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if config.model_type in _REREADING and parameters.get("rope_type") == "longrope":
        return getattr(config, "original_max_position_embeddings", None)
    return None


def context_length(config: Any) -> int | None:
    """The longest text in tokens; None where the config sets no limit.

    ``max_position_embeddings``, stretched where the family's scaling is made for more: by its
    factor with linear, dynamic, yarn and proportional scaling (of the length before it, where the
    config has that). longrope and llama3 write the stretched length there. With scaling per layer
    type the least counts.
    """
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if limit is None or not rope:
        return limit
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return min(_stretched(limit, parameters) for parameters in nested or [rope])


def _stretched(limit: int, parameters: dict[str, Any]) -> int:
    if parameters.get("rope_type") not in _STRETCHING:
        return limit
    before = parameters.get("original_max_position_embeddings") or limit
    return max(limit, int(before * (parameters.get("factor") or 1.0)))


def _kinds(module: Any) -> dict[str | None, str]:
    """Kinds of scaling by layer type; None is the key of a module without layer types."""
    kind = getattr(module, "rope_type", None)
    if isinstance(kind, str):
        return {None: kind}
    return dict(kind) if isinstance(kind, dict) else {}


def _decides(kind: str | None) -> bool:
    """Whether `dynamic_rope_update` looks at the length."""
    return kind is not None and (kind == "longrope" or "dynamic" in kind)


def _prefix(layer_type: str | None) -> str:
    return "" if layer_type is None else f"{layer_type}_"


def _short(module: Any, layer_type: str | None) -> Tensor:
    return getattr(module, f"{_prefix(layer_type)}original_inv_freq")


def _parameters(module: Any, layer_type: str | None) -> dict[str, Any]:
    parameters = module.config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
