"""What families' modules are to the compiled decoder: weights and numbers, by their names there.

Only modules that are exactly the classes whose forward is known are taken over, all the way down
and with nothing changed about them (`untouched`); all others run through their own forward.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, activations
from transformers.pytorch_utils import Conv1D

from inferlab.kernels import PackedWeight
from inferlab.models.attention_hook import LayerSpec
from inferlab.models.experts import QuantizedExperts
from inferlab.models.joined import can_join, join
from inferlab.models.quantized import QuantizedLinear, weight_of
from inferlab.models.untouched import HELPERS, has_weights, is_own_function, is_untouched

Norm = tuple[torch.Tensor, torch.Tensor | None, float, float, bool]
"""Weight, bias, epsilon, what is added to the weight, and whether it is a LayerNorm."""
Matrix = tuple[torch.Tensor | PackedWeight, torch.Tensor | None]
"""Weight [out, in] and bias."""
Stack = torch.Tensor | PackedWeight
Experts = tuple[Matrix, Stack, Stack, int, bool, bool, Matrix | None]
"""Router, gate and up of each [E, 2 I, H], down of each [E, H, I], or both packed, how many a row
takes, whether their weights are made to add up to 1, whether these are rounded to the model's
dtype, and the gate of the MLP beside them."""


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer; see ``DecoderLayer`` in csrc/include/inferlab/decoder.h."""

    input_norm: Norm
    mlp_norm: Norm
    qkv: Matrix
    output: Matrix
    up: Matrix | None
    down: Matrix | None
    activation: str
    q_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float
    attention_norm: Norm | None = None
    down_norm: Norm | None = None
    experts: Experts | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    gated: bool = True
    parallel: bool = False
    by_head: bool = False
    angles: int = 0


@dataclass(frozen=True)
class ModelShape:
    """All of a model; see ``Decoder`` there.

    Attributes:
        rotary: the module that makes angles of positions; None: positions are learnt.
        kinds: of angles that layers have, as ``rotary`` calls them; empty: one, without a name.
    """

    embedding: torch.Tensor
    norm: Norm
    head: Any
    layers: Sequence[LayerShape]
    rotary: nn.Module | None
    kinds: tuple[str, ...] = ()
    embedding_scale: float = 1.0
    places: torch.Tensor | None = None
    first_place: int = 0
    softcap: float = 0.0


def shape_of(model: PreTrainedModel, layers: tuple[LayerSpec, ...]) -> ModelShape:
    """Of a model of which `why_not` knows nothing. Projections of one input are joined: the weights
    of its modules become views of the joint ones."""
    return _FAMILIES[type(model).__name__].read(model, layers)


# --- families ------------------------------------------------------------------------------------


def _llama(model: Any, specs: Sequence[LayerSpec]) -> ModelShape:
    """Pre-norm, rotary halves, gated MLP or experts; Qwen3 norms heads, Phi-3 has joint
    projections."""
    decoder = model.model
    layers = []
    for layer, spec in zip(decoder.layers, specs, strict=True):
        attention = layer.self_attn
        layers.append(
            _gated(
                layer,
                spec,
                input_norm=_rms(layer.input_layernorm),
                mlp_norm=_rms(layer.post_attention_layernorm),
                q_norm=_rms(getattr(attention, "q_norm", None)),
                k_norm=_rms(getattr(attention, "k_norm", None)),
            )
        )
    return ModelShape(
        decoder.embed_tokens.weight.detach(),
        _rms(decoder.norm),
        model.get_output_embeddings(),
        layers,
        decoder.rotary_emb,
    )


def _gemma(model: Any, specs: Sequence[LayerSpec]) -> ModelShape:
    """Norms around attention and MLP, scaled embeddings; Gemma-2 caps logits, Gemma-3 norms heads
    and turns them by other angles where there is a window."""
    decoder = model.model
    rotary = decoder.rotary_emb
    kinds = tuple(getattr(rotary, "layer_types", ()))
    layers = []
    for layer, spec in zip(decoder.layers, specs, strict=True):
        attention = layer.self_attn
        layers.append(
            _gated(
                layer,
                spec,
                input_norm=_rms(layer.input_layernorm),
                attention_norm=_rms(layer.post_attention_layernorm),
                mlp_norm=_rms(layer.pre_feedforward_layernorm),
                down_norm=_rms(layer.post_feedforward_layernorm),
                q_norm=_rms(getattr(attention, "q_norm", None)),
                k_norm=_rms(getattr(attention, "k_norm", None)),
                angles=kinds.index(attention.layer_type) if kinds else 0,
            )
        )
    embed = decoder.embed_tokens
    return ModelShape(
        embed.weight.detach(),
        _rms(decoder.norm),
        model.get_output_embeddings(),
        layers,
        rotary,
        kinds,
        embedding_scale=float(embed.embed_scale.to(embed.weight.dtype)),
        softcap=model.config.final_logit_softcapping or 0.0,
    )


def _opt(model: Any, specs: Sequence[LayerSpec]) -> ModelShape:
    """LayerNorm, learnt positions, plain MLP; queries are scaled before attention sees them."""
    decoder = model.model.decoder
    layers = []
    for layer, spec in zip(decoder.layers, specs, strict=True):
        attention = layer.self_attn
        spec = spec._replace(scale=spec.scale * attention.scaling)
        layers.append(
            _plain(
                spec,
                (layer.self_attn_layer_norm, layer.final_layer_norm),
                join(attention.q_proj, attention.k_proj, attention.v_proj),
                (attention.out_proj, layer.fc1, layer.fc2),
                layer.activation_fn,
            )
        )
    return ModelShape(
        decoder.embed_tokens.weight.detach(),
        _layer_norm(decoder.final_layer_norm),
        model.get_output_embeddings(),
        layers,
        None,
        places=decoder.embed_positions.weight.detach(),
        first_place=decoder.embed_positions.offset,
    )


def _gpt2(model: Any, specs: Sequence[LayerSpec]) -> ModelShape:
    """As OPT; weights of products are transposed."""
    decoder = model.transformer
    layers = []
    for layer, spec in zip(decoder.h, specs, strict=True):
        layers.append(
            _plain(
                spec,
                (layer.ln_1, layer.ln_2),
                _matrix(layer.attn.c_attn),
                (layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj),
                layer.mlp.act,
            )
        )
    return ModelShape(
        decoder.wte.weight.detach(),
        _layer_norm(decoder.ln_f),
        model.get_output_embeddings(),
        layers,
        None,
        places=decoder.wpe.weight.detach(),
    )


def _gpt_neox(model: Any, specs: Sequence[LayerSpec]) -> ModelShape:
    """LayerNorm, part of each head rotated, plain MLP, which may stand beside attention."""
    decoder = model.gpt_neox
    layers = []
    for layer, spec in zip(decoder.layers, specs, strict=True):
        layers.append(
            _plain(
                spec,
                (layer.input_layernorm, layer.post_attention_layernorm),
                _matrix(layer.attention.query_key_value),
                (layer.attention.dense, layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h),
                layer.mlp.act,
                parallel=layer.use_parallel_residual,
                by_head=True,
            )
        )
    return ModelShape(
        decoder.embed_in.weight.detach(),
        _layer_norm(decoder.final_layer_norm),
        model.get_output_embeddings(),
        layers,
        decoder.rotary_emb,
    )


# --- their parts ---------------------------------------------------------------------------------


def _gated(layer: Any, spec: LayerSpec, **more: Any) -> LayerShape:
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj"):
        qkv = _matrix(attention.qkv_proj)
    else:
        qkv = join(attention.q_proj, attention.k_proj, attention.v_proj)
    experts = None
    if hasattr(mlp, "experts"):
        experts, act = _experts(mlp), mlp.experts.act_fn
        mlp = getattr(mlp, "shared_expert", None)
    else:
        act = mlp.activation_fn if hasattr(mlp, "activation_fn") else mlp.act_fn
    up = None
    if mlp is not None:
        joint = hasattr(mlp, "gate_up_proj")
        up = _matrix(mlp.gate_up_proj) if joint else join(mlp.gate_proj, mlp.up_proj)
    return LayerShape(
        qkv=qkv,
        output=_matrix(attention.o_proj),
        up=up,
        down=None if mlp is None else _matrix(mlp.down_proj),
        experts=experts,
        activation=_ACTIVATIONS[type(act)],
        **_heads(spec, attention.o_proj.in_features // spec.head_dim),
        **more,
    )


def _plain(
    spec: LayerSpec,
    norms: Sequence[Any],
    qkv: Matrix,
    linears: Sequence[Any],
    act: Any,
    **more: Any,
) -> LayerShape:
    """LayerNorms, an MLP without a gate, as many heads of q as of k. ``linears``: output, up and
    down."""
    input_norm, mlp_norm = map(_layer_norm, norms)
    output, up, down = map(_matrix, linears)
    return LayerShape(
        input_norm=input_norm,
        mlp_norm=mlp_norm,
        qkv=qkv,
        output=output,
        up=up,
        down=down,
        activation=_ACTIVATIONS[type(act)],
        gated=False,
        **_heads(spec, spec.num_kv_heads),
        **more,
    )


def _experts(block: Any) -> Experts:
    """Mixtral weighs in fp32 by what adds up to 1; Qwen's rounds weights."""
    router, experts = block.gate, block.experts
    qwen = hasattr(router, "norm_topk_prob")
    gate = getattr(block, "shared_expert_gate", None)
    if isinstance(experts, QuantizedExperts):
        stacks: tuple[Stack, Stack] = experts.gate_up, experts.down
    else:
        stacks = experts.gate_up_proj.detach(), experts.down_proj.detach()
    return (
        (router.weight.detach(), None),
        *stacks,
        router.top_k,
        router.norm_topk_prob if qwen else True,
        qwen,
        None if gate is None else _matrix(gate),
    )


def _heads(spec: LayerSpec, q_heads: int) -> dict[str, Any]:
    return {
        "q_heads": q_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "scale": spec.scale,
        "window": spec.window,
        "softcap": spec.softcap,
    }


def _rms(norm: Any) -> Any:
    """None of None. Gemma's weights count from 1."""
    if norm is None:
        return None
    if type(norm).__name__.startswith("Gemma"):
        return norm.weight.detach(), None, norm.eps, 1.0, False
    return norm.weight.detach(), None, norm.variance_epsilon, 0.0, False


def _layer_norm(norm: nn.LayerNorm) -> Norm:
    bias = None if norm.bias is None else norm.bias.detach()
    return norm.weight.detach(), bias, norm.eps, 0.0, True


def _matrix(linear: Any) -> Matrix:
    weight = weight_of(linear)
    if type(linear) is Conv1D:
        assert isinstance(weight, torch.Tensor)
        weight = weight.t()  # contiguous, as `stable.turn` left it
    return weight, None if linear.bias is None else linear.bias.detach()


_ACTIVATIONS: dict[type, str] = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
}


# --- which models --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A family whose forward is known.

    Attributes:
        read: from a model to its shape.
        parts: the classes of its modeling file that its modules are of.
        others: those of libraries, besides linear layers, embeddings, lists and activations.
        misfit: what about a model is not known, in words; None: nothing.
        on_cuda: whether `fused.FusedDecoder` knows it, too.
    """

    read: Callable[[Any, Sequence[LayerSpec]], ModelShape]
    parts: tuple[str, ...]
    others: tuple[type, ...] = ()
    misfit: Callable[[Any], str | None] = lambda model: None
    on_cuda: bool = False


def _named(family: str, *parts: str) -> tuple[str, ...]:
    return tuple(family + part for part in parts)


_LLAMA = (
    "ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding",
)  # fmt: skip
_EXPERTS = ("SparseMoeBlock", "TopKRouter", "Experts")


def _opt_misfit(model: Any) -> str | None:
    decoder = model.model.decoder
    if not all(layer.do_layer_norm_before for layer in decoder.layers):
        return "it norms behind attention and MLP, not before them"
    if decoder.project_in is not None or decoder.project_out is not None:
        return "its embeddings are projected"
    return "it has no norm before its head" if decoder.final_layer_norm is None else None


_FAMILIES = {
    **{
        f"{name}ForCausalLM": Family(_llama, _named(name, *_LLAMA), on_cuda=True)
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
    },
    **{
        f"{name}ForCausalLM": Family(_llama, _named(name, *_LLAMA, *_EXPERTS))
        for name in ("Mixtral", "Qwen2Moe", "Qwen3Moe")
    },
    "Phi3ForCausalLM": Family(_llama, _named("Phi3", *_LLAMA), (nn.Dropout,)),
    "Gemma2ForCausalLM": Family(_gemma, _named("Gemma2", *_LLAMA, "TextScaledWordEmbedding")),
    "Gemma3ForCausalLM": Family(
        _gemma, _named("Gemma3", *_LLAMA, "TextModel", "TextScaledWordEmbedding")
    ),
    "OPTForCausalLM": Family(
        _opt,
        _named(
            "OPT", "ForCausalLM", "Model", "Decoder", "DecoderLayer", "Attention",
            "LearnedPositionalEmbedding",
        ),
        (nn.LayerNorm,),
        _opt_misfit,
    ),
    "GPT2LMHeadModel": Family(
        _gpt2,
        _named("GPT2", "LMHeadModel", "Model", "Block", "Attention", "MLP"),
        (nn.LayerNorm, nn.Dropout, Conv1D),
        lambda model: "it attends to an encoder" if model.config.add_cross_attention else None,
    ),
    "GPTNeoXForCausalLM": Family(
        _gpt_neox,
        _named("GPTNeoX", "ForCausalLM", "Model", "Layer", "Attention", "MLP", "RotaryEmbedding"),
        (nn.LayerNorm, nn.Dropout),
    ),
}  # fmt: skip
"""By the class of the model."""


def why_not(model: PreTrainedModel, layers: tuple[LayerSpec, ...]) -> str | None:
    """What about a model differs from the forwards written here, in words; None: nothing does."""
    kind = type(model).__name__
    device = model.device.type
    if device not in ("cpu", "cuda"):
        return f"the model is on {model.device}"
    known = [name for name, each in _FAMILIES.items() if device == "cpu" or each.on_cuda]
    written_in = sys.modules[type(model).__module__]
    if kind not in known or not written_in.__name__.startswith("transformers.models."):
        return f"{kind} is none of {', '.join(known)}"
    family = _FAMILIES[kind]
    if any(spec.head_dim % 8 for spec in layers):
        return f"its heads are {layers[0].head_dim} wide, no multiple of 8"
    if len({spec[:2] for spec in layers}) > 1:
        return "its layers have different heads"
    # Quantised, adapted, wrapped or watched modules need their own forward to run.
    parts = {getattr(written_in, part, None) for part in family.parts} - {None}
    if any(each.__module__ != written_in.__name__ for each in parts):
        # Others were put in their places there, and so in what their forwards call.
        return f"classes of {written_in.__name__} were exchanged"
    helpers = [vars(written_in)[name] for name in HELPERS if name in vars(written_in)]
    if not all(is_own_function(helper, written_in.__name__) for helper in helpers):
        return f"functions of {written_in.__name__} were exchanged"
    parts |= {nn.Embedding, nn.Linear, nn.ModuleList, *family.others}
    parts |= {QuantizedLinear, QuantizedExperts}
    parts |= {kind for kind, name in _ACTIVATIONS.items() if device == "cpu" or name == "silu"}
    for name, module in model.named_modules():
        if type(module) not in parts:
            return f"{name or 'the model'} is a {type(module).__name__}"
        if not is_untouched(module):
            return f"{name or 'the model'} is hooked, wrapped or has another forward"
        if isinstance(module, nn.LayerNorm) and module.weight is None:
            return f"{name} has no weight"
    if misfit := family.misfit(model):
        return misfit
    if not has_weights(model):
        return "its weights are not all there as plain numbers of one dtype"
    for place, linears in _joined(model):
        if not can_join(linears):
            return f"projections of {place} have different forms"
    return None


def _joined(model: PreTrainedModel) -> Iterable[tuple[str, list[Any]]]:
    """The projections that become one, and whose they are."""
    for place, module in model.named_modules():
        for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            if all(hasattr(module, name) for name in names):
                yield place, [getattr(module, name) for name in names]
