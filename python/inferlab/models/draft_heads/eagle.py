"""EAGLE heads: one decoder layer that continues the target's features.

EAGLE-1 and -2 (Li et al., 2024) predict the target's next last hidden state from the present one
and the next token; the target's LM head reads the prediction. EAGLE-3 (Li et al., 2025) fuses
hidden states of three depths, predicts tokens only, through a norm and an LM head of its own, and
is trained on its own outputs. At position t both see

    embedding of token t + 1    and    feature t

and guess token t + 2. Deeper levels of a draft put the layer's own output in the feature's place.
Names of modules are names of weights in the published files (github SafeAILab/EAGLE).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)


def published_feature_layers(num_layers: int) -> tuple[int, int, int]:
    """Which hidden states EAGLE-3 checkpoints were trained on when their config does not say.

    The published code keeps what enters the decoder layers 2, n // 2 and n - 3, which is what
    leaves the layers before them.
    """
    if num_layers < 6:
        raise ValueError(f"EAGLE-3 needs a target of at least 6 layers, this one has {num_layers}")
    return 1, num_layers // 2 - 1, num_layers - 4


def eagle_config(target: Any, **changes: Any) -> LlamaConfig:
    """A head of the target's own width: heads, MLP, positions and rotation of its config."""
    base = target.get_text_config(decoder=True)
    heads = base.num_attention_heads
    fields = {
        "hidden_size": base.hidden_size,
        "intermediate_size": getattr(base, "intermediate_size", None) or 4 * base.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(base, "num_key_value_heads", None) or heads,
        "head_dim": getattr(base, "head_dim", None) or base.hidden_size // heads,
        "max_position_embeddings": base.max_position_embeddings,
        "rms_norm_eps": getattr(base, "rms_norm_eps", 1e-6),
        "rope_parameters": getattr(base, "rope_parameters", None),
        "vocab_size": base.vocab_size,
        "bos_token_id": base.bos_token_id,
        "eos_token_id": base.eos_token_id,
        "pad_token_id": base.pad_token_id,
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**fields, **changes})


class EagleAttention(nn.Module):
    """Causal attention with grouped heads and rotary positions over inputs of any width."""

    def __init__(self, config: LlamaConfig, input_size: int, bias: bool) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(input_size, query_size, bias=bias)
        self.k_proj = nn.Linear(input_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(input_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def qkv(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries `[B, heads, T, D]`, rotated keys and values `[B, kv_heads, T, D]`."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotation)
        return query, key, value

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Causal, without a cache: `[B, T, width]` -> `[B, T, H]`."""
        query, key, value = self.qkv(x, rotation)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class EagleLayer(nn.Module):
    """The decoder layer; EAGLE-3 norms its two inputs, EAGLE-1 has no norm before attention."""

    def __init__(self, config: LlamaConfig, version: int, bias: bool) -> None:
        super().__init__()
        width = config.hidden_size
        if version == 3:
            self.hidden_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
            self.input_layernorm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.self_attn = EagleAttention(config, 2 * width if version == 3 else width, bias)
        self.post_attention_layernorm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Everything behind the attention's output projection: `[.., H]`."""
        hidden = residual + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class EagleHead(nn.Module):
    """An EAGLE-1/2 (`version` 1) or EAGLE-3 (`version` 3) head for one target.

    Attributes:
        feature_layers: which hidden states of the target make up a feature: i is what leaves
            decoder layer i, counted from 0; -1 is what its LM head sees, after the final norm.
        hidden_size, num_heads, num_kv_heads, head_dim: of the decoder layer.
        feature_size: width of a feature of the target.
        draft_to_target: int64 `[D]`, target ids of a reduced draft vocabulary; None when the head
            speaks all of the target's tokens.

    Args:
        config: shape, norm epsilon and rotation; `draft_vocab_size`, `bias` (of `fc`) and
            `qkv_bias` are the published extra keys.
        version: 1 or 3.
        target: its embeddings and LM head are used, not owned.
        feature_layers: defaults to -1 for version 1, the published choice for version 3.
        own_embedding: the head brings an embedding of its own.
        own_lm_head: an EAGLE-3 head brings an LM head of its own.
    """

    draft_to_target: Tensor | None

    def __init__(
        self,
        config: LlamaConfig,
        version: int,
        target: Any,
        *,
        feature_layers: tuple[int, ...] | None = None,
        own_embedding: bool = False,
        own_lm_head: bool = True,
    ) -> None:
        super().__init__()
        if version not in (1, 3):
            raise ValueError(f"version is {version}, expected 1 (EAGLE-1 and -2) or 3")
        text = target.config.get_text_config(decoder=True)
        if feature_layers is None:
            several = version == 3
            feature_layers = published_feature_layers(text.num_hidden_layers) if several else (-1,)
        if version == 1 and len(feature_layers) != 1:
            raise ValueError(f"feature_layers is {feature_layers}, EAGLE-1 reads exactly one")
        self.config = config
        self.version = version
        self.feature_layers = tuple(feature_layers)
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.feature_size = len(feature_layers) * text.hidden_size
        qkv_bias = bool(getattr(config, "qkv_bias", False))
        self.rotary = LlamaRotaryEmbedding(config)
        reduced: Tensor | None = None
        if own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if version == 1:
            bias = bool(getattr(config, "bias", True))
            self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=bias)
            self.layers = nn.ModuleList([EagleLayer(config, version, qkv_bias)])
        else:
            self.fc = nn.Linear(self.feature_size, config.hidden_size, bias=False)
            self.midlayer = EagleLayer(config, version, qkv_bias)
            self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            draft_vocab = getattr(config, "draft_vocab_size", None) or config.vocab_size
            if own_lm_head:
                self.lm_head = nn.Linear(config.hidden_size, draft_vocab, bias=False)
            if draft_vocab != config.vocab_size:
                reduced = torch.arange(draft_vocab)
        self.register_buffer("draft_to_target", reduced, persistent=False)
        # In a tuple, so that the target's weights do not become weights of the head.
        self._shared = (target.get_input_embeddings(), target.get_output_embeddings())

    def _apply(self, *args: Any, **kwargs: Any) -> EagleHead:
        """Moves and casts all but the rotation, whose frequencies stay fp32."""
        frequencies = self.rotary.inv_freq
        super()._apply(*args, **kwargs)
        moved = self.rotary.inv_freq
        if moved.dtype != frequencies.dtype:
            self.rotary = LlamaRotaryEmbedding(self.config).to(moved.device)
        return self

    @property
    def layer(self) -> EagleLayer:
        """The one decoder layer."""
        layer = self.layers[0] if self.version == 1 else self.midlayer
        assert isinstance(layer, EagleLayer)
        return layer

    @property
    def output_head(self) -> nn.Linear:
        """What makes logits: the head's own LM head, else the target's."""
        return getattr(self, "lm_head", None) or self._shared[1]

    @property
    def embedding(self) -> nn.Embedding:
        """Of token ids of the target: the head's own, else the target's."""
        return getattr(self, "embed_tokens", None) or self._shared[0]

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings `[.., H]` of token ids of the target."""
        return self.embedding(tokens)

    def enter(self, embeds: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The attention's input and the residual stream beside it.

        Args:
            embeds: of token t + 1, `[.., H]`.
            features: of the target, `[.., feature_size]`, or the layer's own output, `[.., H]`.

        Returns:
            `[.., H]` (EAGLE-1) or `[.., 2H]` (EAGLE-3) for q, k and v; and `[.., H]`.
        """
        if self.version == 1:
            fused = self.fc(torch.cat([embeds, features], dim=-1))
            return fused, fused
        if features.shape[-1] != self.hidden_size:
            features = self.fc(features)
        layer = self.layer
        normed = layer.input_layernorm(embeds), layer.hidden_norm(features)
        return torch.cat(normed, dim=-1), features

    def forward(self, embeds: Tensor, features: Tensor, positions: Tensor | None = None) -> Tensor:
        """Runs whole sequences, causally.

        Args:
            embeds: of tokens 1 .. T, `[B, T, H]`.
            features: of positions 0 .. T - 1, `[B, T, F]`.
            positions: `[B or 1, T]`, by default 0 .. T - 1.

        Returns:
            `[B, T, H]`: what `logits` reads, and the feature of a next level.
        """
        if positions is None:
            positions = torch.arange(embeds.shape[1], device=embeds.device)[None]
        x, residual = self.enter(embeds, features)
        attended = self.layer.self_attn(x, self.rotary(x, positions))
        return self.layer.finish(residual, attended)

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """Logits over the draft vocabulary, `[.., D]`; D = V unless the vocabulary is reduced."""
        return self.output_head(hidden if self.version == 1 else self.norm(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the target's vocabulary, `[.., V]`; -inf where the head knows no token."""
        return self.spread(self.draft_logits(hidden))

    def spread(self, logits: Tensor) -> Tensor:
        """Logits of the draft vocabulary in the columns of the target's."""
        if self.draft_to_target is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
        return full.index_copy_(-1, self.draft_to_target, logits)
