"""Shapes of the bundled pair, and the attention used while training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PretrainedConfig,
)
from transformers.masking_utils import AttentionMaskInterface

MAX_POSITIONS = 1024
VOCAB_SIZE = 4096

TARGET_SHAPE: dict[str, Any] = {
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 16,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
DRAFT_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}

# Training sees full, unpadded, causal windows only. For those, plain matrix products beat
# torch's flash attention on CPUs, whose backward pass took 40 % of a step of the bundled target.
_TRAINING_ATTENTION = "inferlab_training"
_bias_cache: dict[int, Tensor] = {}


def model_config(
    shape: dict[str, Any],
    *,
    vocab_size: int,
    max_positions: int = MAX_POSITIONS,
    eos_id: int = 0,
    family: str = "llama",
) -> PretrainedConfig:
    """Configuration of a model with tied embeddings; `family` is its `model_type`."""
    return AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        bos_token_id=eos_id,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
        **shape,
    )


def new_model(config: PretrainedConfig, *, seed: int) -> Any:
    """A freshly initialised fp32 causal LM.

    Projections that write to the residual stream start smaller by 1/sqrt(2 * layers), as in
    GPT-2, so that the stream's variance does not grow with depth.
    """
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                param.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


def use_training_attention(model: LlamaForCausalLM) -> None:
    """Makes the model attend causally over whole windows, whatever mask it is given."""
    AttentionInterface.register(_TRAINING_ATTENTION, _causal_attention)
    AttentionMaskInterface.register(_TRAINING_ATTENTION, _no_mask)
    model.set_attn_implementation(_TRAINING_ATTENTION)


def causal_bias(length: int) -> Tensor:
    """fp32 `[length, length]`: 0 where the row may see the column, -inf elsewhere.

    Kept between calls: computing it inside the compiled graph stops the compiler from
    vectorising the softmax around it.
    """
    if length not in _bias_cache:
        _bias_cache[length] = torch.full((length, length), float("-inf")).triu(1)
    return _bias_cache[length]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _causal_attention(
    module: nn.Module,
    query: Tensor,  # [B, heads, T, dim]
    key: Tensor,  # [B, kv_heads, T, dim]
    value: Tensor,  # [B, kv_heads, T, dim]
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    rows = (query * scaling).reshape(batch * kv_heads, group * length, dim)
    scores = rows @ key.reshape(batch * kv_heads, length, dim).transpose(1, 2)
    scores = scores.view(batch, kv_heads, group, length, length).float() + causal_bias(length)
    weights = torch.softmax(scores, dim=-1).to(query.dtype)
    weights = weights.view(batch * kv_heads, group * length, length)
    mixed = weights @ value.reshape(batch * kv_heads, length, dim)
    return mixed.view(batch, heads, length, dim).transpose(1, 2).contiguous(), None
