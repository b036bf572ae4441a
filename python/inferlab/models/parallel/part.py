"""What one rank holds of models and caches, and what all ranks can do with them together."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from inferlab.models import loading
from inferlab.models.early_exit import EarlyExit
from inferlab.models.forward import ForwardBatch, ForwardOutput
from inferlab.models.hf import HFModel
from inferlab.models.kv_cache import KVCache


class ModelPart:
    """A rank's parts of models and caches, by the keys that the leader gave them."""

    def __init__(self) -> None:
        self._held: dict[int, Any] = {}

    def drop(self, keys: Sequence[int]) -> None:
        """See `ranks.Part`."""
        for key in keys:
            self._held.pop(key, None)

    def load(self, key: int, name: str, size: int, options: Mapping[str, Any]) -> None:
        """Reads this rank's part of the weights; no rank waits for another meanwhile."""
        self._held[key] = loading.load(name, tensor_parallel=size, **options)

    def wrap(self, key: int, name: str, kv_cache_dtype: str) -> HFModel:
        """Makes of what was loaded a model over this rank's pages."""
        loaded: loading.LoadedModel = self._held.pop(key)
        model = HFModel(
            loaded.model, loaded.tokenizer, name=name, engine="hf", kv_cache_dtype=kv_cache_dtype
        )
        model.load_notes = loaded.notes
        self._held[key] = model
        return model

    def first_layers(self, key: int, model: int, layers: int | None) -> HFModel:
        """The first layers of a model as another one (see `EarlyExit`)."""
        self._held[key] = EarlyExit(self._held[model], layers)
        shallow: HFModel = self._held[key]
        return shallow

    def rebuild(self, model: int) -> None:
        """See `HFModel.rebuild`."""
        self._held[model].rebuild()

    def new_cache(self, key: int, model: int, num_pages: int, page_size: int) -> KVCache:
        """Pages for this rank's heads."""
        cache: KVCache = self._held[model].new_cache(num_pages, page_size)
        self._held[key] = cache
        return cache

    def forward(
        self, model: int, cache: int, batch: ForwardBatch, layers: tuple[int, ...]
    ) -> ForwardOutput:
        """See `HFModel.forward`."""
        output: ForwardOutput = self._held[model].forward(batch, self._held[cache], layers)
        return output

    def compact(self, cache: int, *args: torch.Tensor) -> None:
        """See `KVCache.compact`."""
        self._held[cache].compact(*args)

    def copy_pages(self, cache: int, src: torch.Tensor, dst: torch.Tensor) -> None:
        """See `KVCache.copy_pages`."""
        self._held[cache].copy_pages(src, dst)

    @torch.inference_mode(False)
    @torch.no_grad()
    def whole(self, model: int, which: str) -> nn.Module:
        """A copy of the model's "embed" or "head" with all of its weights."""
        module: nn.Module = getattr(self._held[model], which)
        own = copy.copy(module)
        vars(own).pop("forward", None)  # which knows that it has but a part
        own._parameters = {
            name: None if weight is None else nn.Parameter(_whole(weight), requires_grad=False)
            for name, weight in module._parameters.items()
        }
        return own

    def generate(self, model: int, seed: int, inputs: Mapping[str, Any]) -> Any:
        """Hugging Face's ``generate``, with the same draws on all ranks."""
        with self._held[model].plain() as plain:
            torch.manual_seed(seed)
            return plain.generate(**inputs)

    def call(self, model: int, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The logits of the plain model."""
        with self._held[model].plain() as plain, torch.inference_mode():
            logits: torch.Tensor = plain(**inputs).logits
            return logits


def _whole(weight: Any) -> torch.Tensor:
    full: torch.Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight.data
    return full
