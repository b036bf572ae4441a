"""The three kinds of students: how each is made, taught and saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from inferlab.models import HFModel, loading
from inferlab.models.draft_heads import (
    EagleHead,
    MedusaHeads,
    eagle_config,
    load_eagle,
    load_medusa,
    save_eagle,
    save_medusa,
)
from inferlab.training.heads import losses
from inferlab.training.precision import training_dtype
from inferlab.training.target.architectures import (
    DRAFT_SHAPE,
    model_config,
    new_model,
    use_training_attention,
)

ARGMAX_WEIGHT = 0.5
MEDUSA_HEADS = 4
MEDUSA_LAYERS = 1
EAGLE_STEPS = 4


@dataclass(frozen=True)
class Student:
    """One student of one target.

    Attributes:
        description: what it is, in words.
        mode: draft mode that serves it.
        module: what is trained, in the dtype of `training_dtype`.
        feature_layers: what is read of the target; -1, the teacher's, is always the last.
        positions: how many tokens ahead it is taught.
        max_positions: how many tokens ahead it is measured at most.
        loss: from module, tokens, features and LM head to a loss per position.
        save: writes the weights, as they are by then, to a folder.
    """

    description: str
    mode: str
    module: nn.Module
    feature_layers: tuple[int, ...]
    positions: int
    max_positions: int
    loss: Callable[..., Tensor]
    save: Callable[[Path], None]


def medusa_student(
    target: HFModel,
    *,
    init_from: str | None = None,
    num_heads: int | None = None,
    num_layers: int | None = None,
    tied: bool = False,
    root_token: bool = False,
    argmax_weight: float = ARGMAX_WEIGHT,
) -> Student:
    """Medusa heads; LM heads of fresh ones start as the target's.

    Earlier heads that are started from may be fewer or have fewer blocks: a fresh block leaves its
    input as it is. Whether they are tied is theirs to say.
    """
    _refuse_with(init_from, {"--tied": tied or None})
    lm_head: Any = target.head
    vocab_size, hidden_size = lm_head.weight.shape
    earlier = None if init_from is None else load_medusa(init_from, target.model)
    if earlier is not None:
        num_heads, num_layers = num_heads or earlier.num_heads, num_layers or earlier.num_layers
        tied = earlier.tied
        root_token = root_token or earlier.reads_token
        if num_layers < earlier.num_layers:
            raise ValueError(
                f"--layers is {num_layers}, but the heads of --init-from {init_from} have "
                f"{earlier.num_layers} blocks; ask for as many or more"
            )
    heads = MedusaHeads(
        num_heads or MEDUSA_HEADS,
        num_layers or MEDUSA_LAYERS,
        hidden_size,
        vocab_size,
        target_head=lm_head,
        tied=tied,
        embedding=target.embed if root_token else None,
    ).to(lm_head.weight.device)
    heads.start_from_target()
    if earlier is not None:
        heads.start_from(earlier)
    heads.to(training_dtype(lm_head.weight.device))

    return Student(
        description=f"{heads.num_heads} Medusa heads of {heads.num_layers} block(s)"
        + (", tied" if heads.tied else "")
        + (", reading the newest token" if heads.reads_token else ""),
        mode="medusa",
        module=heads,
        feature_layers=(-1,),
        positions=heads.num_heads,
        max_positions=heads.num_heads,
        loss=partial(losses.medusa_loss, argmax_weight=argmax_weight),
        save=lambda folder: save_medusa(folder, heads, base_model=target.name),
    )


def eagle_student(
    target: HFModel,
    *,
    init_from: str | None = None,
    version: int | None = None,
    feature_layers: tuple[int, ...] | None = None,
    steps: int = EAGLE_STEPS,
    argmax_weight: float = ARGMAX_WEIGHT,
) -> Student:
    """An EAGLE head, by default EAGLE-3; the LM head of a fresh one starts as the target's.

    An earlier head that is started from is what it is: ``version`` and ``feature_layers`` are those
    of a fresh one.
    """
    _refuse_with(init_from, {"--version": version, "--features": feature_layers})
    lm_head: Any = target.head
    if init_from is not None:
        head = load_eagle(init_from, target.model).requires_grad_(True)
    else:
        _check_layers(feature_layers or (), target)
        config = eagle_config(target.config)
        head = EagleHead(config, version or 3, target.model, feature_layers=feature_layers)
        if head.version == 3:
            with torch.no_grad():
                head.lm_head.weight.copy_(lm_head.weight)
    device = lm_head.weight.device
    head.to(device, training_dtype(device))
    layers = head.feature_layers

    return Student(
        description=f"EAGLE-{head.version} head over layers {', '.join(map(str, layers))}",
        mode="eagle",
        module=head,
        feature_layers=layers if layers[-1] == -1 else (*layers, -1),
        positions=steps if head.version == 3 else 1,
        max_positions=8,
        loss=partial(losses.eagle3_loss, argmax_weight=argmax_weight, steps=steps)
        if head.version == 3
        else losses.eagle1_loss,
        save=lambda folder: save_eagle(folder, head),
    )


def _check_layers(layers: tuple[int, ...], target: HFModel) -> None:
    count = len(target.layers)
    wrong = [layer for layer in layers if not -1 <= layer < count]
    if wrong:
        raise ValueError(f"--features: {wrong[0]} is no layer of 0 to {count - 1}, nor -1")


def _refuse_with(init_from: str | None, flags: dict[str, Any]) -> None:
    """Raises ValueError where a flag describes fresh heads, and earlier ones are started from."""
    given = [flag for flag, value in flags.items() if value is not None]
    if init_from is not None and given:
        raise ValueError(
            f"{' and '.join(given)}: not with --init-from {init_from}, whose heads are what they "
            "are; leave one of them out"
        )


def new_draft(
    target: HFModel,
    init_from: str | None = None,
    *,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A draft model for a target: a fresh one of the bundled shape, or one that is started from.

    Raises:
        ValueError: ``init_from`` cannot be loaded or has another tokenizer.
    """
    if init_from is None:
        config = model_config(
            DRAFT_SHAPE,
            vocab_size=target.config.vocab_size,
            eos_id=target.tokenizer.eos_token_id,
        )
        return new_model(config, seed=seed).to(target.device)
    try:
        where = str(target.device)
        loaded = loading.load(init_from, dtype="bfloat16", device=where, dense=True)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"--init-from {init_from}: {error}") from error
    if loaded.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise ValueError(
            f"--init-from {init_from}: its tokenizer differs from that of --base-model "
            f"{target.name}, so their token ids mean different text; leave --init-from out or "
            "name a model with the same tokenizer"
        )
    return loaded.model


def draft_student(
    draft: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    argmax_weight: float = ARGMAX_WEIGHT,
) -> Student:
    """A draft model with the target's tokenizer; it never reads the target, only its teacher is."""
    draft.to(training_dtype(draft.device))
    use_training_attention(draft)

    def save(folder: Path) -> None:
        draft.set_attn_implementation("sdpa")
        copy.deepcopy(draft).bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        use_training_attention(draft)

    return Student(
        description=f"draft model of {draft.num_parameters():,} parameters",
        mode="vanilla",
        module=draft,
        feature_layers=(-1,),
        positions=1,
        max_positions=8,
        loss=partial(losses.draft_loss, argmax_weight=argmax_weight),
        save=save,
    )
