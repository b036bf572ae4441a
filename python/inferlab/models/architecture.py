"""Which architectures the paged cache can serve, found out by looking and by one traced pass."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from inferlab.models.attention_hook import (
    STEP_KEYWORD,
    LayerSpec,
    Trace,
    UnsupportedArchitectureError,
)

# Families whose logits are compared with Hugging Face's own in the tests, by config.model_type.
TESTED = (
    "opt",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3_text",
)

_TESTED_NAMES = "OPT, GPT-2, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma-2 and Gemma-3"


def check_config(config: Any, name: str, model_class: type | None) -> None:
    """Refuses by name what cannot work, before any weight is read.

    Args:
        config: a transformers config.
        name: what the user called the model.
        model_class: the class that transformers would build for causal LM; None if it has none.

    Raises:
        UnsupportedArchitectureError: with the reason and what works.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        _refuse(name, kind, "is an encoder-decoder, not a causal language model")
    if any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config")):
        _refuse(name, kind, "is multimodal; load a text-only checkpoint of the family")
    if model_class is None:
        _refuse(name, kind, "is not a causal language model")
    if getattr(model_class, "_is_stateful", False):
        _refuse(name, kind, "keeps a recurrent state, which cannot be rolled back along a tree")
    if not getattr(model_class, "_supports_attention_backend", False):
        _refuse(name, kind, "does not call transformers' attention interface")


def check_model(model: PreTrainedModel, name: str) -> None:
    """`check_config` for a model that is already there."""
    check_config(model.config, name, type(model) if model.can_generate() else None)
    if model.get_output_embeddings() is None:
        _refuse(name, model.config.model_type, "has no language-modelling head")


def trace_layers(model: PreTrainedModel, name: str) -> tuple[LayerSpec, ...]:
    """Runs one short pass with attention replaced by a recorder.

    Returns:
        Per layer: heads, head dim, scale, window and soft-cap, as the model itself passes them.

    Raises:
        UnsupportedArchitectureError: a layer does not reach the hook or asks for what it lacks.
    """
    trace = Trace(model.config.get_text_config(decoder=True), name)
    ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    positions = torch.arange(2, device=model.device).unsqueeze(0)
    with torch.inference_mode():
        model(input_ids=ids, position_ids=positions, use_cache=False, **{STEP_KEYWORD: trace})
    return trace.layers()


def _refuse(name: str, kind: str, why: str) -> NoReturn:
    raise UnsupportedArchitectureError(
        f"{name}: architecture {kind!r} {why}. Tested families: {_TESTED_NAMES}; other decoders "
        "whose attention goes through transformers' AttentionInterface are taken too"
    )
