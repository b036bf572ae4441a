"""The target that students learn from."""

from __future__ import annotations

from dataclasses import replace

from inferlab.models import HFModel
from inferlab.training.material.writing import MaterialConfig


def load_target(name: str, device: str) -> HFModel:
    """The target in bf16, with its tokenizer; its weights learn nothing.

    Raises:
        ValueError: it cannot be loaded or not be decoded with, its tokenizer has tokens that the
            model lacks, or the device is a CUDA device but the first.
    """
    if device.startswith("cuda:") and device != "cuda:0":
        raise ValueError(
            f"--device is {device!r}; the trainer uses the first GPU that it sees: give --device "
            f"cuda, and choose the GPU with CUDA_VISIBLE_DEVICES={device.removeprefix('cuda:')}"
        )
    try:
        target = HFModel.load(name, device=device, dtype="bfloat16")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"--base-model {name}: {error}") from error
    if len(target.tokenizer) > target.vocab_size:
        raise ValueError(
            f"--base-model {name}: its tokenizer has {len(target.tokenizer)} tokens, the model "
            f"{target.vocab_size}; put the model's own tokenizer beside its weights"
        )
    target.model.requires_grad_(False)
    return target


def within_context(material: MaterialConfig, target: HFModel) -> MaterialConfig:
    """The same windows, long ones no longer than the target can read."""
    context = target.context_length
    if context is None:
        return material
    # One more token is written than read.
    if material.window_length >= context:
        raise ValueError(
            f"--window is {material.window_length}, the target reads at most {context - 1} tokens "
            "to write one behind them"
        )
    return replace(material, long_length=min(material.long_length, context))
