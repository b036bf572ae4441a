"""A target that lies on several ranks, as the leader sees it: a target like any other."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch

from inferlab.errors import UsageError
from inferlab.models.base import TargetModel
from inferlab.models.forward import ForwardBatch, ForwardOutput
from inferlab.models.hf import HFModel
from inferlab.models.kv_cache import KVCache
from inferlab.models.parallel.part import ModelPart
from inferlab.models.parallel.ranks import Ranks, leader

_keys = count()


class ShardedModel:
    """A model of which every rank has a part, in the leader's hands; see `TargetModel`.

    What is done with it is done on all ranks together. Draft heads that read its embedding or its
    output head are given copies with all weights, on the leader's device.

    Args:
        ranks: led by this process.
        key: of the part that each of them holds.
        part: the leader's own.
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

    def __init__(self, ranks: Ranks, key: int, part: HFModel) -> None:
        vars(self).update({fact: getattr(part, fact) for fact in TargetModel.__annotations__})
        self.config = part.config
        self.engine = part.engine
        self.load_notes = part.load_notes
        self._ranks = ranks
        self._key = key
        self._part = part
        self._whole: dict[str, torch.nn.Module] = {}
        weakref.finalize(self, ranks.drop, key)

    @classmethod
    def load(
        cls, name: str, size: int, *, kv_cache_dtype: str = "auto", **options: Any
    ) -> ShardedModel:
        """Loads a model onto ``size`` ranks, which are started if they are not there.

        Args:
            kv_cache_dtype, options: as of `HFModel.load`, but for ``quantization``.

        Raises:
            UsageError: another number of ranks is there, or too few devices.
            ValueError: as `HFModel.load` raises.
            UnsupportedArchitectureError: the model cannot be shared out (see `plans`).
        """
        ranks = leader(size, ModelPart())
        key = next(_keys)
        ranks.everywhere("load", key, name, size, options, confirmed=True)
        part = ranks.everywhere("wrap", key, name, kv_cache_dtype, confirmed=True)
        return cls(ranks, key, part)

    def first_layers(self, layers: int | None) -> ShardedModel:
        """The first layers as a model of its own, see `EarlyExit`."""
        key = next(_keys)
        part = self._ranks.everywhere("first_layers", key, self._key, layers, confirmed=True)
        return ShardedModel(self._ranks, key, part)

    @property
    def embed(self) -> torch.nn.Module:
        """The embedding, with all of its weights."""
        return self._all_of("embed")

    @property
    def head(self) -> torch.nn.Module:
        """The output head, with all of its weights."""
        return self._all_of("head")

    def new_cache(self, num_pages: int, page_size: int = 16) -> KVCache:
        """Pages on every rank, for its own heads; sizes are those of one rank."""
        key = next(_keys)
        args = (key, self._key, num_pages, page_size)
        part = self._ranks.everywhere("new_cache", *args, confirmed=True)
        return ShardedCache(self._ranks, key, part)

    def notice_changes(self) -> None:
        """See `HFModel.notice_changes`, of the leader's part: what passes are made for it, all
        ranks take part in."""
        if self._part.was_changed:
            self._ranks.everywhere("rebuild", self._key, confirmed=True)

    def forward(
        self, batch: ForwardBatch, cache: KVCache, layers: tuple[int, ...] = ()
    ) -> ForwardOutput:
        """See `TargetModel.forward`."""
        assert isinstance(cache, ShardedCache), "from `new_cache` of a model on several ranks"
        output: ForwardOutput = self._ranks.everywhere(
            "forward", self._key, cache.key, batch, layers
        )
        return output

    @contextmanager
    def plain(self) -> Iterator[Any]:
        """What there is of the Hugging Face model on the leader: see `PlainModel`."""
        yield PlainModel(self._ranks, self._key, self)

    def _all_of(self, which: str) -> torch.nn.Module:
        if which not in self._whole:
            self._whole[which] = self._ranks.everywhere("whole", self._key, which)
        return self._whole[which]


class PlainModel:
    """A Hugging Face model on several ranks: its configuration, ``generate`` and logits, and the
    two modules that draft heads share; other modules have but a part of the weights."""

    def __init__(self, ranks: Ranks, key: int, model: ShardedModel) -> None:
        self._ranks = ranks
        self._key = key
        self._model = model
        self.config = model._part.model.config
        self.generation_config = model._part.model.generation_config
        self.name_or_path = model._part.model.name_or_path
        self.device = model.device
        self.dtype = model.dtype

    def get_input_embeddings(self) -> torch.nn.Module:
        """With all weights."""
        return self._model.embed

    def get_output_embeddings(self) -> torch.nn.Module:
        """With all weights."""
        return self._model.head

    def generate(self, **inputs: Any) -> Any:
        """See transformers; on all ranks, whose draws hang on this process's generator."""
        if inputs.get("assistant_model") is not None:
            raise UsageError(
                f"{self._model.name} lies on {self._ranks.size} ranks, where generate takes no "
                "assistant_model"
            )
        seed = int(torch.randint(2**62, ()))
        inputs.setdefault("generation_config", self.generation_config)
        return self._ranks.everywhere("generate", self._key, seed, inputs)

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        """``logits``, without a cache."""
        return SimpleNamespace(logits=self._ranks.everywhere("call", self._key, inputs))


class ShardedCache(KVCache):
    """Pages on every rank; what the leader's do the others' do as well.

    Args:
        key: of the cache on each rank.
        part: the leader's own.
    """

    def __init__(self, ranks: Ranks, key: int, part: KVCache) -> None:
        vars(self).update(vars(part))
        self.key = key
        self._ranks = ranks
        weakref.finalize(self, ranks.drop, key)

    def compact(
        self,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        accepted_nodes: torch.Tensor,
        num_accepted: torch.Tensor,
    ) -> None:
        """See `KVCache.compact`."""
        args = (block_table, seq_lens, accepted_nodes, num_accepted)
        self._ranks.everywhere("compact", self.key, *args)

    def copy_pages(self, src: torch.Tensor, dst: torch.Tensor) -> None:
        """See `KVCache.copy_pages`."""
        self._ranks.everywhere("copy_pages", self.key, src, dst)
