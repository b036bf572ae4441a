"""What the engine asks of a model, whether it has weights (HFModel) or not (FakeLM)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch

from inferlab.models.forward import ForwardBatch, ForwardOutput
from inferlab.models.kv_cache import KVCache


@runtime_checkable
class TargetModel(Protocol):
    """A causal language model over a paged cache. Targets and draft models are the same thing.

    Attributes:
        name: what the user called it.
        vocab_size: columns of the logits (may exceed the tokenizer's vocabulary: padding).
        tokenizer_vocab_size: ids that the tokenizer knows, added tokens included; None without a
            tokenizer. See `allowed_vocab`.
        context_length: longest sequence in tokens, None where the model sets no limit.
        reread_length: a text that gets longer than this is read anew, all its K/V (see `rotary`);
            None: never.
        device, dtype: where logits live and their element type.
        eos_token_ids: ids that end a text, possibly none; all below `allowed_vocab`.
        tokenizer: a Hugging Face tokenizer or None.
        num_parameters: number of distinct weights.
        quantization: the format of packed weights; None: they are of ``dtype``.
        kv_cache_dtype: of the pages of its caches; "auto": ``dtype``.
        embed: from token ids [..] to what enters the first layer, [.., H]; None without weights.
        head: from `FINAL_HIDDEN` [.., H] to logits [.., V]; None without weights.
    """

    name: str
    vocab_size: int
    tokenizer_vocab_size: int | None
    context_length: int | None
    reread_length: int | None
    device: torch.device
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    tokenizer: Any
    num_parameters: int
    quantization: str | None
    kv_cache_dtype: str

    @property
    def embed(self) -> torch.nn.Module | None: ...

    @property
    def head(self) -> torch.nn.Module | None: ...

    def new_cache(self, num_pages: int, page_size: int = 16) -> KVCache:
        """A zeroed paged cache that fits this model."""
        ...

    def notice_changes(self) -> None:
        """Called before a text is read: what was changed about the model counts from here on."""
        ...

    def forward(
        self, batch: ForwardBatch, cache: KVCache, layers: tuple[int, ...] = ()
    ) -> ForwardOutput:
        """Writes K/V to `cache`; returns logits, and the hidden states of ``layers``.

        Args:
            batch: tokens, positions and who sees whom (see `ForwardBatch`).
            cache: from `new_cache` of this model.
            layers: hidden states that are wanted: i is the output of decoder layer i (the first is
                0), `FINAL_HIDDEN` (-1) what the output head sees.

        Raises:
            ValueError: the model has no such layer, or no hidden states at all.
        """
        ...

    def plain(self) -> AbstractContextManager[Any] | None:
        """The Hugging Face model by itself for the length of a ``with`` block, in which `forward`
        is not to be called; None for a model without weights."""
        ...


def plain_model(model: TargetModel, use: str) -> AbstractContextManager[Any]:
    """`TargetModel.plain` for what cannot do without.

    Args:
        use: what needs it, to begin the message with.

    Raises:
        ValueError: the model has no weights.
    """
    plain = model.plain()
    if plain is None:
        raise ValueError(
            f"{use} needs a model with weights and hidden states; {model.name} has none: use "
            "implementation 'hf'"
        )
    return plain


def format_of(model: TargetModel) -> str:
    """The element type of a model and, where they are of others, of its weights and its K/V."""
    parts = [str(model.dtype).removeprefix("torch.")]
    if model.quantization is not None:
        parts.append(f"{model.quantization} weights")
    if model.kv_cache_dtype != "auto":
        parts.append(f"{model.kv_cache_dtype} K/V")
    return ", ".join(parts)


def allowed_vocab(model: TargetModel) -> int:
    """How many ids may be chosen: those that the tokenizer knows.

    What else the logits have is padding, columns that training left to chance: neither the target
    nor a draft ever chooses one, under any policy. Without a tokenizer all columns count.
    """
    known = model.tokenizer_vocab_size
    return model.vocab_size if known is None else min(known, model.vocab_size)


def known_ids(tokenizer: Any) -> int:
    """Ids up to the tokenizer's last one: ``len(tokenizer)``, and the gaps where it leaves any.

    Gaps are forbidden by a bias where there is a tokenizer, see `unknown_ids`.
    """
    return 1 + max(tokenizer.get_vocab().values(), default=len(tokenizer) - 1)


def unknown_ids(tokenizer: Any, vocab_size: int) -> list[int]:
    """Columns of the logits that no token has: padding behind the last id, and gaps before it."""
    known = set(tokenizer.get_vocab().values())
    return [id_ for id_ in range(vocab_size) if id_ not in known] if known else []
