"""The decoder layers of Llama-shaped models in few calls, on a GPU; on a CPU a whole forward is one
call (`native`).

Hugging Face's layer is some thirty small torch calls around four matrix products; for a model of
some million parameters they take several times as long as the products. Here a layer is nine
calls: Q, K and V are one product, gate and up another, and what lies between is fused
(`kernels.rms_norm`, `silu_mul`, `rope_append`). The weights are Hugging Face's own tensors, as
views into the joint ones. `shapes.why_not` knows which models it is for.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from inferlab.kernels import (
    PackedWeight,
    linear,
    packed_linear,
    paged_tree_attention,
    rms_norm,
    rope_append,
    silu_mul,
)
from inferlab.models.attention_hook import LayerSpec, Pass
from inferlab.models.forward import FINAL_HIDDEN, ForwardBatch, ForwardOutput
from inferlab.models.joined import join
from inferlab.models.kv_cache import KVCache
from inferlab.models.quantized import weight_of

# Up to here reading the weights is the work; beyond, torch's blocked products win.
MAX_CUDA_ROWS = 16


class FusedDecoder:
    """Runs embedding to logits of one model, of which `shapes.why_not` knows nothing."""

    def __init__(self, model: PreTrainedModel, layers: tuple[LayerSpec, ...]) -> None:
        self._model = model.model
        self._head = model.lm_head
        self._vocab = model.lm_head.out_features
        self._norm_weight = self._model.norm.weight
        self._norm_eps = self._model.norm.variance_epsilon
        self._specs = layers
        self._layers = [
            DecoderLayer(layer, spec)
            for layer, spec in zip(self._model.layers, layers, strict=True)
        ]

    def first(self, count: int) -> FusedDecoder:
        """The first ``count`` layers alone, then norm and head; with the same weights."""
        shallow = copy.copy(self)
        shallow._layers, shallow._specs = self._layers[:count], self._specs[:count]
        return shallow

    def forward(
        self,
        batch: ForwardBatch,
        cache: KVCache,
        feature_layers: tuple[int, ...] = (),
        *,
        by_length: bool = False,
    ) -> ForwardOutput:
        """See `HFModel.forward`; angles are the module's own, whatever they depend on."""
        size, nodes = batch.tokens.shape
        ongoing = Pass.of(batch, cache, self._specs)
        hidden = self._model.embed_tokens(batch.tokens)
        cos, sin = self._model.rotary_emb(hidden, batch.positions)
        hidden = hidden.view(-1, hidden.shape[-1])
        features: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(self._layers):
            hidden = layer.forward(hidden, size, nodes, cos, sin, ongoing, index)
            if index in feature_layers:
                features[index] = hidden.clone()  # the next layer may add in place
        scored = batch.scored
        if scored is not None and FINAL_HIDDEN not in feature_layers:
            hidden, scored = hidden[scored], None
        hidden = rms_norm(hidden, self._norm_weight, self._norm_eps)
        features[FINAL_HIDDEN] = hidden
        if scored is not None:
            hidden = hidden[scored]
        logits = product(hidden, weight_of(self._head), self._head.bias)
        wanted = [features[index] for index in feature_layers]
        logits = logits.view(*((size, nodes) if batch.scored is None else (-1, 1)), self._vocab)
        if not wanted:
            return ForwardOutput(logits)
        wanted = [each.view(size, nodes, -1) for each in wanted]
        return ForwardOutput(logits, wanted[0] if len(wanted) == 1 else torch.cat(wanted, dim=-1))


class DecoderLayer:
    """Weights and sizes of one decoder layer. ``layer`` may do without ``input_layernorm``."""

    def __init__(self, layer: Any, spec: LayerSpec) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.kv_heads = spec.num_kv_heads
        self.head_dim = spec.head_dim
        self.scale, self.window, self.softcap = spec.scale, spec.window, spec.softcap
        self.q_heads = attention.q_proj.out_features // spec.head_dim
        self.qkv = join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = attention.o_proj
        self.gate_up = join(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj
        self.norm: Any = getattr(layer, "input_layernorm", None)
        self.post_norm = layer.post_attention_layernorm
        self.q_norm: Any = getattr(attention, "q_norm", None)  # Qwen3 norms each head
        self.k_norm: Any = getattr(attention, "k_norm", None)

    def forward(
        self,
        hidden: torch.Tensor,
        size: int,
        nodes: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        ongoing: Pass,
        index: int,
    ) -> torch.Tensor:
        """hidden: [B * N, H] -> [B * N, H], may be overwritten; K/V goes to the pages of layer
        `index`."""
        normed = rms_norm(hidden, self.norm.weight, self.norm.variance_epsilon)
        return self.attend(normed, hidden, size, nodes, cos, sin, ongoing, index)

    def attend(
        self,
        x: torch.Tensor,
        hidden: torch.Tensor,
        size: int,
        nodes: int,
        cos: torch.Tensor,
        sin: torch.Tensor,
        ongoing: Pass,
        index: int,
    ) -> torch.Tensor:
        """All behind the first norm.

        Args:
            x: [B * N, inputs of q, k, v].
            hidden: [B * N, H], what it is added to; may be overwritten.
        """
        k_pages, v_pages = ongoing.pages[index]
        qkv = product(x, *self.qkv)
        qkv = qkv.view(size, nodes, -1, self.head_dim)
        q = qkv[:, :, : self.q_heads]
        k = qkv[:, :, self.q_heads : self.q_heads + self.kv_heads]
        v = qkv[:, :, self.q_heads + self.kv_heads :]
        if self.q_norm is not None:
            q = rms_norm(q.contiguous(), self.q_norm.weight, self.q_norm.variance_epsilon)
            k = rms_norm(k.contiguous(), self.k_norm.weight, self.k_norm.variance_epsilon)
        where: dict[str, Any] = {"node_offset": ongoing.node_offset, "num_nodes": ongoing.num_nodes}
        rope_append(
            q, k, v, cos, sin, k_pages, v_pages, ongoing.block_table, ongoing.seq_lens, **where
        )
        attended = paged_tree_attention(
            q,
            k_pages,
            v_pages,
            ongoing.block_table,
            ongoing.seq_lens,
            ongoing.ancestors,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            **where,
        )
        attended = attended.view(len(hidden), -1)
        hidden = add_product(hidden, attended, weight_of(self.out), self.out.bias)
        normed = rms_norm(hidden, self.post_norm.weight, self.post_norm.variance_epsilon)
        gated = silu_mul(product(normed, *self.gate_up))
        return add_product(hidden, gated, weight_of(self.down), self.down.bias)


def product(
    x: torch.Tensor,
    weight: torch.Tensor | PackedWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias + residual``; on CUDA few rows by our kernel, many by torch's.

    On a CPU all of them are ours: a row's bits must not depend on how many rows share the call, and
    torch sums in another order for other numbers of rows.
    """
    if isinstance(weight, PackedWeight):
        packed: torch.Tensor = packed_linear(x, weight, bias, residual)
        return packed
    if is_ours(x):
        return linear(x, weight, bias, residual, constant_weight=True)
    out = torch.nn.functional.linear(x, weight, bias)
    return out if residual is None else out.add_(residual)


def add_product(
    hidden: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | PackedWeight,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``hidden + x @ weight.T + bias``; may overwrite ``hidden``."""
    if isinstance(weight, torch.Tensor) and x.is_cuda and bias is None and not is_ours(x):
        return hidden.addmm_(x, weight.t())  # the sum in the product's own launch
    return product(x, weight, bias, hidden)


def is_ours(x: torch.Tensor) -> bool:
    """Whether products of x [rows, .] are by our kernel."""
    if x.is_cuda:
        return x.shape[0] <= MAX_CUDA_ROWS and x.dtype != torch.float32
    return x.is_cpu
