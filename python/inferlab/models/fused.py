"""The decoder layers of Llama-shaped models in few calls, or in one.

Hugging Face's layer is some thirty small torch calls around four matrix products; for a model of
some million parameters they take several times as long as the products. Here a layer is nine
calls, on a GPU: Q, K and V are one product, gate and up another, and what lies between is fused
(`kernels.rms_norm`, `silu_mul`, `rope_append`). On a CPU the whole forward is one call (`native`).
The weights are Hugging Face's own tensors, as views into the joint ones.

Only modules that are exactly the classes whose forward is known are taken over, all the way down
and with nothing changed about them (`untouched`); all others run through their own forward.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from inferlab.kernels import (
    PackedWeight,
    linear,
    packed_linear,
    paged_tree_attention,
    rms_norm,
    rope_append,
    silu_mul,
)
from inferlab.kernels.packed_weight import OUTPUTS as PACKED_OUTPUTS
from inferlab.models.attention_hook import LayerSpec, Pass
from inferlab.models.forward import FINAL_HIDDEN, ForwardBatch, ForwardOutput
from inferlab.models.kv_cache import KVCache
from inferlab.models.native import NativeDecoder
from inferlab.models.quantized import QuantizedLinear, weight_of
from inferlab.models.untouched import HELPERS, has_weights, is_own_function, is_untouched

# Up to here reading the weights is the work; beyond, torch's blocked products win.
MAX_CUDA_ROWS = 16

# Pre-norm, rotary halves, gated SiLU, no scaling of embeddings, residuals or logits.
_KNOWN = ("Llama", "Mistral", "Qwen2", "Qwen3")
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")


class FusedDecoder:
    """Runs embedding to logits of one model, of which `why_not` knows nothing.

    Args:
        limit: the model's context length; None: there is none.

    Attributes:
        native: what does it in one call, on a CPU; else None.
    """

    def __init__(
        self, model: PreTrainedModel, layers: tuple[LayerSpec, ...], limit: int | None
    ) -> None:
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
        self.native = None
        if self._norm_weight.is_cpu:
            self.native = NativeDecoder(model, self._layers, limit)

    def first(self, count: int) -> FusedDecoder:
        """The first ``count`` layers alone, then norm and head; with the same weights."""
        shallow = copy.copy(self)
        shallow._layers, shallow._specs = self._layers[:count], self._specs[:count]
        shallow.native = None if self.native is None else self.native.first(count)
        return shallow

    def forward(
        self,
        batch: ForwardBatch,
        cache: KVCache,
        feature_layers: tuple[int, ...] = (),
        *,
        by_length: bool = False,
    ) -> ForwardOutput:
        """See `HFModel.forward`. ``by_length``: angles depend on more than the position."""
        if self.native is not None:
            return self.native.forward(batch, cache, feature_layers, by_length=by_length)
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
    return whole and len({(each.bits, each.group) for each in linears}) == 1


def why_not(model: PreTrainedModel, layers: tuple[LayerSpec, ...]) -> str | None:
    """What about a model differs from the forward written here, in words; None: nothing does."""
    kind = type(model).__name__
    family = kind.removesuffix("ForCausalLM")
    written_in = sys.modules[type(model).__module__]
    if family not in _KNOWN or not written_in.__name__.startswith("transformers.models."):
        return f"{kind} is none of {', '.join(f'{name}ForCausalLM' for name in _KNOWN)}"
    if model.device.type not in ("cpu", "cuda"):
        return f"the model is on {model.device}"
    if any(spec.head_dim % 8 for spec in layers):
        return f"its heads are {layers[0].head_dim} wide, no multiple of 8"
    # Quantised, adapted, wrapped or watched modules need their own forward to run.
    known = {getattr(written_in, family + part) for part in _PARTS}
    if any(each.__module__ != written_in.__name__ for each in known):
        # Others were put in their places there, and so in what their forwards call.
        return f"classes of {written_in.__name__} were exchanged"
    if not all(is_own_function(getattr(written_in, n), written_in.__name__) for n in HELPERS):
        return f"functions of {written_in.__name__} were exchanged"
    known |= {nn.Embedding, nn.Linear, QuantizedLinear, nn.ModuleList, nn.SiLU, SiLUActivation}
    for name, module in model.named_modules():
        if type(module) not in known:
            return f"{name or 'the model'} is a {type(module).__name__}"
        if not is_untouched(module):
            return f"{name or 'the model'} is hooked, wrapped or has another forward"
    for index, layer in enumerate(model.model.layers):
        mlp, attention = layer.mlp, layer.self_attn
        if type(mlp.act_fn) not in (nn.SiLU, SiLUActivation):
            return f"its activation is {type(mlp.act_fn).__name__}"
        joint = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
        if not all(map(can_join, joint)):
            return f"projections of layer {index} have different forms"
    return None if has_weights(model) else "its weights are not all there, of one dtype"
