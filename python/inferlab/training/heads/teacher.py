"""The target that students learn from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerFast

from inferlab.models import loading
from inferlab.training.material.writing import MaterialConfig


def load_target(name: str, device: str) -> tuple[Any, PreTrainedTokenizerFast]:
    """The target in bf16 and its tokenizer.

    Raises:
        ValueError: it cannot be loaded, its tokenizer has tokens that the model lacks, or the
            device is a CUDA device but the first.
    """
    if device.startswith("cuda:") and device != "cuda:0":
        raise ValueError(
            f"--device is {device!r}; the trainer uses the first GPU that it sees: give --device "
            f"cuda, and choose the GPU with CUDA_VISIBLE_DEVICES={device.removeprefix('cuda:')}"
        )
    try:
        loaded = loading.load(name, device=device, dtype="bfloat16")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"--base-model {name}: {error}") from error
    target = loaded.model.eval().requires_grad_(False)
    known = target.get_output_embeddings().weight.shape[0]
    if len(loaded.tokenizer) > known:
        raise ValueError(
            f"--base-model {name}: its tokenizer has {len(loaded.tokenizer)} tokens, the model "
            f"{known}; put the model's own tokenizer beside its weights"
        )
    return target, loaded.tokenizer


def within_context(material: MaterialConfig, target: Any) -> MaterialConfig:
    """The same windows, long ones no longer than the target can read."""
    context = target.config.get_text_config(decoder=True).max_position_embeddings
    if material.window_length > context:
        raise ValueError(
            f"--window is {material.window_length}, the target reads at most {context} tokens"
        )
    return replace(material, long_length=min(material.long_length, context))
