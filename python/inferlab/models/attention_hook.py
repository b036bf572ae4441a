"""The attention function Hugging Face models call: append K/V to the pages, attend to the tree.

``AttentionInterface.register`` makes it known under the name ``inferlab``. The model passes extra
keyword arguments of its own call down to it, which is how the step arrives here: no global state,
no cache object, and since the name is not registered for masks, no masks are built at all
(transformers' ``_preprocess_mask_arguments``). A call without a step would therefore attend to the
wrong keys; it raises instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import AttentionInterface

from inferlab.kernels import kv_append, paged_tree_attention
from inferlab.models.forward import ForwardBatch
from inferlab.models.kv_cache import KVCache
from inferlab.models.packing import Packing

ATTENTION_NAME = "inferlab"
PASS_KEYWORD = "inferlab_pass"
MAX_HEAD_DIM = 256


class MissingStepError(RuntimeError):
    """A switched model was called by other means than `HFModel.forward`."""


class LayerSpec(NamedTuple):
    """What one attention layer asks of the kernel; constant over the life of a model.

    window 0: no sliding window. softcap 0: none.
    """

    num_kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float

    @property
    def cached_dim(self) -> int:
        """The head dim in the cache: the kernel's vectors are of 8, the rest is zeros."""
        return -(-self.head_dim // 8) * 8


@dataclass(slots=True)
class Pass:
    """One forward pass on its way through the layers.

    Attributes:
        packing: how what the layers see as packed rows goes into [B, N] and back; None: they see
            [B, N] themselves.
    """

    layers: Sequence[LayerSpec]
    pages: Sequence[tuple[torch.Tensor, torch.Tensor]]
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    ancestors: torch.Tensor | None
    num_nodes: torch.Tensor | None
    node_offset: int
    packing: Packing | None = None
    _elsewhere: dict[torch.device, tuple[torch.Tensor | None, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: ForwardBatch, cache: KVCache, layers: Sequence[LayerSpec]) -> Pass:
        return cls(
            layers,
            cache.pages,
            batch.block_table,
            batch.seq_lens,
            batch.ancestors,
            batch.num_nodes,
            batch.node_offset,
        )

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """query [B, Hq, N, D], key and value [B, Hkv, N, D]; returns [B, N, Hq, D].

        Where the pass is packed, B is 1 and N is R throughout.
        """
        k_pages, v_pages = self.pages[layer]
        _, dim, scale, window, softcap = self.layers[layer]
        block_table, seq_lens, ancestors, num_nodes = self._on(k_pages.device)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if self.packing is not None:
            query, key, value = (self.packing.pad(x[0]) for x in (query, key, value))
        padding = self.layers[layer].cached_dim - dim
        if padding:
            query, key, value = (pad(x, (0, padding)) for x in (query, key, value))
        kv_append(
            key,
            value,
            k_pages,
            v_pages,
            block_table,
            seq_lens,
            node_offset=self.node_offset,
            num_nodes=num_nodes,
        )
        out = paged_tree_attention(
            query,
            k_pages,
            v_pages,
            block_table,
            seq_lens,
            ancestors,
            scale=scale,
            window=window,
            softcap=softcap,
            node_offset=self.node_offset,
            num_nodes=num_nodes,
        )
        if self.packing is not None:
            out = self.packing.pack(out)[None]
        return out[..., :dim] if padding else out

    def _on(self, device: torch.device) -> tuple[Any, ...]:
        """Where sequences lie and who sees whom, on a layer's device; brought there once."""
        where = (self.block_table, self.seq_lens, self.ancestors, self.num_nodes)
        if device == self.block_table.device:
            return where
        if device not in self._elsewhere:
            self._elsewhere[device] = tuple(
                None if each is None else each.to(device, non_blocking=True) for each in where
            )
        return self._elsewhere[device]


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    inferlab_pass: Any = None,
    **details: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it; `details` were read once, when the model was traced."""
    if inferlab_pass is None:
        raise MissingStepError(
            "a model with attention implementation 'inferlab' was called without a step: call "
            "HFModel.forward, or take the plain model back with HFModel.plain()"
        )
    if isinstance(inferlab_pass, Pass):
        return inferlab_pass.attend(module.layer_idx, query, key, value), None  # type: ignore[arg-type]
    return inferlab_pass.record(module, query, key, value, attention_mask, details), None


AttentionInterface.register(ATTENTION_NAME, attention)


# Keyword arguments that do not change what causal attention computes. Anything else that is set
# (attention sinks, position biases, head masks, ...) would be silently ignored: such models are
# refused instead.
_HARMLESS = frozenset(
    {
        "dropout",
        "scaling",
        "sliding_window",
        "softcap",
        "is_causal",
        "position_ids",
        "position_embeddings",
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
    }
)


class Trace:
    """Stands in for a step in one short pass and writes down what each attention layer asks for.

    Args:
        config: the text config of the model.
        model_name: for messages.
    """

    def __init__(self, config: Any, model_name: str) -> None:
        self.specs: dict[int, LayerSpec] = {}
        self._devices: dict[int, torch.device] = {}
        self._config = config
        self._name = model_name

    def record(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        details: dict[str, Any],
    ) -> torch.Tensor:
        layer = getattr(module, "layer_idx", None)
        where = f"{type(module).__name__} (layer {layer})"
        if not isinstance(layer, int):
            self._refuse(f"{where} does not say which layer it is")
        if layer in self.specs:
            self._refuse(f"{where} computes attention twice in one pass")
        if not getattr(module, "is_causal", True) or details.get("is_causal") is False:
            self._refuse(f"{where} is not causal")
        unknown = {k for k, v in details.items() if v is not None and v is not False} - _HARMLESS
        if unknown:
            self._refuse(f"{where} needs {', '.join(sorted(unknown))}, which the kernel lacks")
        if attention_mask is not None:
            self._refuse(f"{where} builds an attention mask of its own")
        heads, dim = key.shape[1], key.shape[-1]
        if value.shape != key.shape or query.shape[-1] != dim or query.shape[1] % heads:
            self._refuse(
                f"{where} has queries {tuple(query.shape)}, keys {tuple(key.shape)}, values "
                f"{tuple(value.shape)}; the paged cache needs keys and values of one shape"
            )
        if dim > MAX_HEAD_DIM:
            self._refuse(f"{where} has heads of {dim} channels; the kernel takes {MAX_HEAD_DIM}")
        scaling = details.get("scaling")
        self._devices[layer] = key.device
        self.specs[layer] = LayerSpec(
            heads,
            dim,
            dim**-0.5 if scaling is None else float(scaling),
            self._window(layer, details.get("sliding_window"), where),
            float(details.get("softcap") or 0.0),
        )
        return query.transpose(1, 2).contiguous()

    def layers(self, empty: Collection[int] = ()) -> tuple[LayerSpec, ...]:
        """The specs by layer index, once the pass is over.

        Args:
            empty: layers that were replaced by modules without weights, such as an identity: their
                pages are never used.
        """
        expected = self._config.num_hidden_layers
        for layer in set(empty) - self.specs.keys():
            self.specs[layer] = next(iter(self.specs.values()), LayerSpec(1, 1, 1.0, 0, 0.0))
        if sorted(self.specs) != list(range(expected)):
            self._refuse(
                f"of its {expected} layers only {len(self.specs)} go through the attention hook "
                "(state-space, convolution and shared-KV layers do not)"
            )
        return tuple(self.specs[i] for i in range(expected))

    def devices(self, main: torch.device) -> tuple[torch.device, ...]:
        """Where each layer attends; ``main``: of those without attention."""
        return tuple(self._devices.get(layer, main) for layer in sorted(self.specs))

    def _window(self, layer: int, window: int | None, where: str) -> int:
        kinds = getattr(self._config, "layer_types", None)
        kind = kinds[layer] if kinds else None
        if kind not in (None, "full_attention", "sliding_attention"):
            self._refuse(f"{where} has attention of kind {kind!r}")
        if kind == "sliding_attention" and not window:
            self._refuse(f"{where} slides but does not hand its window to the hook")
        if kind == "full_attention":
            return 0
        return int(window or 0)

    def _refuse(self, why: str) -> NoReturn:
        raise UnsupportedArchitectureError(f"{self._name} cannot run on the paged cache: {why}")


class UnsupportedArchitectureError(ValueError):
    """A model whose attention the paged cache and the tree kernels cannot stand in for."""
