"""Hugging Face causal language models as target or draft, over the paged cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedModel

from inferlab.models import loading
from inferlab.models.architecture import check_model, trace_layers
from inferlab.models.attention_hook import ATTENTION_NAME, LayerSpec, Step
from inferlab.models.batch import ForwardBatch
from inferlab.models.kv_cache import KVCache


class HFModel:
    """A transformers causal LM whose attention runs on paged K/V and token trees.

    The model keeps its own modules and weights; only its attention function is exchanged
    (see `attention_hook`), so what a family does elsewhere (rotary variants, post-norms, logit
    soft-capping) stays Hugging Face's. The given model is switched over in place; `plain` gives
    it back for the length of a ``with`` block.

    Args:
        model: a loaded causal LM, on its device, in its dtype.
        tokenizer: its tokenizer; None where only token ids go in and out.
        name: for messages and results; default: the model's ``name_or_path``.

    Raises:
        UnsupportedArchitectureError: the architecture's attention does not go through the hook, or
            asks for something the kernels lack. The message says what and lists what works.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, *, name: str | None = None
    ) -> None:
        self.name: str = name or str(getattr(model, "name_or_path", "")) or type(model).__name__
        check_model(model, self.name)
        model.eval()
        self._model = model
        self._plain_attention: str = model.config._attn_implementation or "eager"
        if self._plain_attention == ATTENTION_NAME:
            raise ValueError(f"{self.name} is already wrapped in an HFModel; use that one")
        model.set_attn_implementation(ATTENTION_NAME)
        try:
            self._layers: tuple[LayerSpec, ...] = trace_layers(model, self.name)
        except Exception:
            model.set_attn_implementation(self._plain_attention)
            raise

        self.config: Any = model.config.get_text_config(decoder=True)
        self.tokenizer: Any = tokenizer
        self._head = model.get_output_embeddings()
        self.vocab_size: int = self._head.weight.shape[0]
        self.tokenizer_vocab_size: int | None = None if tokenizer is None else len(tokenizer)
        self.context_length: int | None = getattr(self.config, "max_position_embeddings", None)
        self.device: torch.device = self._head.weight.device
        self.dtype: torch.dtype = self._head.weight.dtype
        self.eos_token_ids: tuple[int, ...] = _eos_token_ids(model, tokenizer)
        self.num_parameters: int = sum(p.numel() for p in model.parameters())
        self.load_notes: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        name_or_path: str | PathLike[str],
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        device_priority: Sequence[str] = loading.DEVICE_PRIORITY,
        max_memory_mb: float | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> HFModel:
        """Loads a bundled model, a local directory or a hub id (see `loading.load`)."""
        loaded = loading.load(
            name_or_path,
            device=device,
            dtype=dtype,
            device_priority=device_priority,
            max_memory_mb=max_memory_mb,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
        target = cls(loaded.model, loaded.tokenizer, name=str(name_or_path))
        target.load_notes = loaded.notes
        return target

    def new_cache(self, num_pages: int, page_size: int = 16) -> KVCache:
        """A zeroed cache of `num_pages` pages per layer, in the model's dtype and device."""
        shapes = [(spec.num_kv_heads, spec.cached_dim) for spec in self._layers]
        return KVCache(shapes, num_pages, page_size, dtype=self.dtype, device=self.device)

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """What each attention layer asks of the kernel."""
        return self._layers

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: KVCache) -> torch.Tensor:
        """One pass: K/V of all nodes into `cache`, logits out.

        Args:
            batch: tokens, positions and who sees whom (see `ForwardBatch`).
            cache: from `new_cache` of this model.

        Returns:
            logits [B, N, V] in the model's dtype; [B, 1, V] with ``batch.last_only``. Rows at
            padding hold no meaning.
        """
        step = Step.of(batch, cache, self._layers)
        if not batch.last_only or batch.tokens.shape[1] == 1:
            return self._logits(batch, step)
        rows = None if batch.num_nodes is None else batch.num_nodes.long() - 1
        with _last_rows_only(self._head, rows):
            return self._logits(batch, step)

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """The model as Hugging Face made it (for ``generate``); `forward` fails meanwhile."""
        self._model.set_attn_implementation(self._plain_attention)
        try:
            yield self._model
        finally:
            self._model.set_attn_implementation(ATTENTION_NAME)

    def _logits(self, batch: ForwardBatch, step: Step) -> torch.Tensor:
        return self._model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            use_cache=False,
            inferlab_step=step,
        ).logits


@contextmanager
def _last_rows_only(head: torch.nn.Module, rows: torch.Tensor | None) -> Iterator[None]:
    """Cuts what reaches the output head to one row per sequence (rows [B] i64; None: the last).

    A hook rather than ``logits_to_keep``, which takes the same rows of all sequences and which not
    every architecture has.
    """

    def cut(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]
        if rows is None:
            return (hidden[:, -1:],)
        index = torch.arange(hidden.shape[0], device=hidden.device)
        return (hidden[index, rows].unsqueeze(1),)

    handle = head.register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def _eos_token_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    """End-of-text ids: the generation config's, else the config's, else the tokenizer's."""
    generation = getattr(model, "generation_config", None)
    for source in (generation, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(int(i) for i in (ids if isinstance(ids, (list, tuple)) else (ids,)))
    return ()
