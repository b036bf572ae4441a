"""Hugging Face causal language models as target or draft, over the paged cache."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedModel

from inferlab.models import loading
from inferlab.models.architecture import (
    TESTED,
    UnsupportedArchitectureError,
    check_against_plain,
    check_model,
    decoder_layers,
    execution_device,
    plan_forward,
    trial_pass,
    unwrapped,
    works_by_rows,
)
from inferlab.models.attention_hook import ATTENTION_NAME, PASS_KEYWORD, LayerSpec, Pass
from inferlab.models.base import allowed_vocab, known_ids
from inferlab.models.forward import FINAL_HIDDEN, ForwardBatch, ForwardOutput
from inferlab.models.fused import FusedDecoder
from inferlab.models.graphs import ForwardGraphs
from inferlab.models.kv_cache import KVCache, check_page_format
from inferlab.models.native import NativeDecoder
from inferlab.models.other_formats import PACKAGES, check_other_format
from inferlab.models.packing import Packing
from inferlab.models.quantized import DENSE, check_format, num_parameters, quantize
from inferlab.models.rotary import context_length, length_rotary, reread_length
from inferlab.models.shapes import shape_of, why_not
from inferlab.models.stable import StableProducts, experts_implementation, turn
from inferlab.models.untouched import Snapshot
from inferlab.types import check

logger = logging.getLogger(__name__)

ENGINES = ("auto", "native", "hf")


class HFModel:
    """A transformers causal LM whose attention runs on paged K/V and token trees.

    The model keeps its weights and, in general, its modules; only its attention function is
    exchanged (see `attention_hook`), so what a family does elsewhere (rotary variants, post-norms,
    logit soft-capping) stays Hugging Face's. Models of known families run in one call on a CPU (see
    `native`, `shapes`), Llama-shaped ones on a CUDA device through fewer, fused calls (see `fused`)
    and from graphs (see `graphs`), as long as nothing about them was changed: hooks, replaced,
    wrapped, adapted (LoRA) or quantised modules and offloaded weights run as they are. Changes made
    later count from the next prompt on. The given model is switched over in place; `plain` gives it
    back for the length of a ``with`` block. Threads may share it: forwards run one at a time.

    Args:
        model: a loaded causal LM, on its device, in its dtype; also compiled by torch (its own
            modules run then) or with PEFT adapters.
        tokenizer: its tokenizer; None where only token ids go in and out.
        name: for messages and results; default: the model's ``name_or_path``.
        engine: what runs the forward: "native", our own calls, which is an error where they
            cannot; "hf", the model's own modules; "auto", the first that can.

    Raises:
        UnsupportedArchitectureError: the architecture's attention does not go through the hook, or
            asks for something the kernels lack. The message says what and lists what works.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        *,
        name: str | None = None,
        engine: str = "auto",
        kv_cache_dtype: str = "auto",
    ) -> None:
        check("engine", engine, engine in ENGINES, f"one of {', '.join(ENGINES)}")
        self._asked_engine = engine
        self.name: str = name or str(getattr(model, "name_or_path", "")) or type(model).__name__
        model = unwrapped(model, self.name)
        check_model(model, self.name)
        model.eval()
        self._model = model
        self._plain_attention: str = model.config._attn_implementation or "eager"
        if self._plain_attention == ATTENTION_NAME:
            raise ValueError(
                f"{self.name} is already wrapped in an HFModel, or shares its config object with "
                "one that is; use that HFModel, or build the model from a copy of the config"
            )
        self.config: Any = model.config.get_text_config(decoder=True)
        self.tokenizer: Any = tokenizer
        # Forwards hook modules, replay graphs and may change rotary tables: one at a time.
        self._lock = threading.RLock()
        self.device: torch.device = execution_device(model, self.name)
        check_page_format(kv_cache_dtype, self.device)
        self.kv_cache_dtype = kv_cache_dtype
        self.tokenizer_vocab_size: int | None = None if tokenizer is None else known_ids(tokenizer)
        self.reread_length: int | None = reread_length(self.config)
        self.dtype: torch.dtype = model.dtype
        self.num_parameters: int = num_parameters(model)
        self.load_notes: tuple[str, ...] = ()
        self._plain_experts = experts_implementation(model) if self.device.type == "cpu" else None
        self._take_over()
        try:
            self._build()
            if model.config.model_type not in TESTED:
                self._check_against_plain()
        except Exception:
            self._hand_back()
            raise
        self.eos_token_ids: tuple[int, ...] = self._choosable(_eos_token_ids(model, tokenizer))

    def _take_over(self) -> None:
        """Lets the model's modules use our attention and, on a CPU, our products of experts."""
        self._model.set_attn_implementation(ATTENTION_NAME)
        if self._plain_experts is not None:
            self._model.set_experts_implementation("eager")

    def _hand_back(self) -> None:
        """The model as Hugging Face made it."""
        self._model.set_attn_implementation(self._plain_attention)
        if self._plain_experts is not None:
            self._model.set_experts_implementation(self._plain_experts)

    def _choosable(self, end_ids: tuple[int, ...]) -> tuple[int, ...]:
        """End-of-text ids without those that can never be chosen, as `generate` ignores them."""
        allowed = allowed_vocab(self)
        outside = [id_ for id_ in end_ids if not 0 <= id_ < allowed]
        if outside:
            logger.warning(
                "%s: end-of-text id %s is outside the vocabulary of %d ids and is ignored; correct "
                "eos_token_id in the model's configuration",
                self.name,
                ", ".join(map(str, outside)),
                allowed,
            )
        return tuple(id_ for id_ in end_ids if id_ not in outside)

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
        device_map: str | Mapping[str, int | str] | None = None,
        quantization: str | None = None,
        engine: str = "auto",
        kv_cache_dtype: str = "auto",
    ) -> HFModel:
        """Loads a bundled model, a local directory or a hub id (see `loading.load`), and packs its
        weights where ``quantization`` names a format: of ours (`quantized.quantize`) or of another
        package (`other_formats`). "dense": weights that come rounded (`unpacking`) are made dense,
        also where they could be multiplied with as they are. ``kv_cache_dtype`` is of the pages of
        its caches (`kv_cache.PAGE_FORMATS`)."""
        packed = None if quantization == DENSE else quantization
        others = packed if packed in PACKAGES else None
        place = loading.choose_device(device, device_priority)
        check_page_format(kv_cache_dtype, place)
        if packed is not None:
            check = check_format if others is None else check_other_format
            check(packed, place)
        loaded = loading.load(
            name_or_path,
            device=device,
            dtype=dtype,
            device_priority=device_priority,
            max_memory_mb=max_memory_mb,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            device_map=device_map,
            quantization=others,
            dense=quantization is not None,
        )
        if packed is not None and others is None:
            quantize(loaded.model, packed)
        target = cls(
            loaded.model,
            loaded.tokenizer,
            name=str(name_or_path),
            engine=engine,
            kv_cache_dtype=kv_cache_dtype,
        )
        target.load_notes = loaded.notes
        return target

    def new_cache(self, num_pages: int, page_size: int = 16) -> KVCache:
        """A zeroed cache of `num_pages` pages per layer, on the model's device."""
        return self._cache_of(num_pages, page_size, self.kv_cache_dtype)

    def _cache_of(self, num_pages: int, page_size: int, kv_cache_dtype: str) -> KVCache:
        shapes = [(spec.num_kv_heads, spec.cached_dim) for spec in self.layers]
        return KVCache(
            shapes,
            num_pages,
            page_size,
            dtype=self.dtype,
            device=self.device,
            devices=self._plan.devices,
            kv_cache_dtype=kv_cache_dtype,
        )

    def with_pages_of(self, kv_cache_dtype: str) -> HFModel:
        """The same model, weights and all, with caches of another format."""
        check_page_format(kv_cache_dtype, self.device)
        other = copy.copy(self)
        other.kv_cache_dtype = kv_cache_dtype
        return other

    @property
    def is_spread(self) -> bool:
        """Whether its layers lie on several devices."""
        return len(set(self._plan.devices)) > 1

    @property
    def model(self) -> PreTrainedModel:
        """The wrapped model, for its weights; to run it by itself use `plain`."""
        return self._model

    @property
    def embed(self) -> torch.nn.Module:
        """The model's embedding."""
        embed: torch.nn.Module = self._model.get_input_embeddings()
        return embed

    @property
    def head(self) -> torch.nn.Module:
        """The model's output head."""
        return self._head

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """What each attention layer asks of the kernel."""
        return self._plan.layers

    @torch.inference_mode()
    def forward(
        self, batch: ForwardBatch, cache: KVCache, layers: tuple[int, ...] = ()
    ) -> ForwardOutput:
        """One pass: K/V of all nodes into `cache`, logits out, and what ``layers`` ask for.

        Logits are in the model's dtype; rows at padding hold no meaning. See `TargetModel.forward`.

        Raises:
            ValueError: the model has no such layer.
        """
        for layer in layers:
            if not FINAL_HIDDEN <= layer < len(self.layers):
                raise ValueError(
                    f"{self.name} has no hidden state {layer}: its {len(self.layers)} layers are "
                    f"numbered from 0, and -1 is what the output head sees"
                )
        with self._lock:
            if self._graphs is not None:
                return self._graphs.forward(batch, cache, layers)
            return self._run(batch, cache, layers)

    @torch.inference_mode()
    def draft_chain(self, *args: Any) -> tuple[int, list[int] | None] | None:
        """See `NativeDecoder.draft_chain`; None where the model does not run in one, or its angles
        depend on the length of a text."""
        with self._lock:
            if not isinstance(self._fused, NativeDecoder) or self._rotary is not None:
                return None
            return self._fused.draft_chain(*args)

    def _run(self, batch: ForwardBatch, cache: KVCache, layers: tuple[int, ...]) -> ForwardOutput:
        rotary, by_length = self._rotary, self._rotary is not None
        with nullcontext() if rotary is None else rotary.standing_in(batch.prompt_lens):
            if self._fused is not None:
                return self._fused.forward(batch, cache, layers, by_length=by_length)
            ongoing = Pass.of(batch, cache, self._plan.layers)
            if self._can_pack:
                ongoing.packing = Packing.of(batch)
            return self._run_modules(batch, ongoing, layers)

    def _run_modules(
        self, batch: ForwardBatch, ongoing: Pass, layers: tuple[int, ...]
    ) -> ForwardOutput:
        plan, packing = self._plan, ongoing.packing
        tokens, positions = batch.tokens, batch.positions
        if packing is not None:  # as one sequence, of which only attention knows better
            tokens, positions = packing.pack(tokens)[None], packing.pack(positions)[None]
        inputs = {
            "input_ids": tokens,
            "position_ids": positions,
            "use_cache": False,
            PASS_KEYWORD: ongoing,
        }
        with self._stable, self._watched(layers) as features:
            if plan.decoder_forward is not None:
                hidden = plan.decoder_forward(plan.decoder, **inputs).last_hidden_state
                features[FINAL_HIDDEN] = hidden
                logits = self._head(_scored_rows(hidden, batch))
            else:

                def see(hidden: torch.Tensor) -> torch.Tensor:
                    features[FINAL_HIDDEN] = hidden
                    return _scored_rows(hidden, batch)

                with _head_input(self._head, see):
                    logits = self._model(**inputs).logits
        wanted = None
        if layers:
            wanted = torch.cat([features[layer].to(tokens.device) for layer in layers], dim=-1)
        if packing is not None:
            logits = packing.pad(logits[0])
            wanted = None if wanted is None else packing.pad(wanted[0])
        return ForwardOutput(logits, wanted)

    def _build(self) -> None:
        """Finds out how the model is to be run, as it is now."""
        self._head = self._model.get_output_embeddings()
        self.quantization: str | None = getattr(self._model, "inferlab_quantization", None)
        self._rotary = length_rotary(self._model)
        self.context_length: int | None = context_length(self.config)
        if self._rotary is not None and not self._rotary.is_right:
            # Its own module is right for texts that no scaling touches.
            self.context_length, self._rotary = self._rotary.switch, None
        turn(self._model)
        self._plan = plan_forward(self._model, self.device, self.name)
        self.vocab_size: int = self._plan.vocab_size
        self._fused = self._new_fused()
        self._can_pack = works_by_rows(self._model)
        self._graphs = self._new_graphs()
        self._stable: AbstractContextManager[Any] = (
            StableProducts() if self.device.type == "cpu" else nullcontext()
        )
        self._seen: Snapshot | None = Snapshot(self._model)

    def _new_fused(self) -> FusedDecoder | NativeDecoder | None:
        """What runs in place of the model's modules; None: they run themselves."""
        if self._asked_engine == "hf":
            return None
        why = why_not(self._model, self.layers)
        if why is None:
            if self.device.type == "cuda":
                return FusedDecoder(self._model, self.layers)
            return NativeDecoder(shape_of(self._model, self.layers), self.context_length)
        if self._asked_engine == "native":
            raise UnsupportedArchitectureError(
                f"{self.name}: engine is 'native', but {why}; take 'auto' or 'hf'"
            )
        logger.info("%s: its own modules run, since %s", self.name, why)
        return None

    @property
    def engine(self) -> str:
        """What runs the forward: "native", or "hf", the model's own modules."""
        return "hf" if self._fused is None else "native"

    @property
    def built(self) -> Hashable | None:
        """Tells forwards before and after changes apart; None: they cannot be captured in a CUDA
        graph."""
        return self._graphs

    def notice_changes(self) -> None:
        """Where modules, weights or settings were exchanged, hooked or given another forward since
        it was called last, what was built on them is built anew.

        Raises:
            UnsupportedArchitectureError: the model cannot be served any longer.
            ValueError: it has another dtype, device, vocabulary or attention heads of another size:
                caches do not fit.
        """
        with self._lock:
            if self.was_changed:
                self.rebuild()

    @property
    def was_changed(self) -> bool:
        """Whether anything was exchanged since it was last built on."""
        with self._lock:
            return self._seen is None or not self._seen.holds()

    def rebuild(self) -> None:
        """Builds anew, on the model as it is now; raises as `notice_changes` does."""
        with self._lock, torch.inference_mode(False):
            logger.info("%s was changed: what runs it is built anew", self.name)
            vocab_size, shapes = self.vocab_size, [spec[:2] for spec in self.layers]
            model = self._model
            if model.config._attn_implementation != ATTENTION_NAME:  # by who shares the config
                model.set_attn_implementation(ATTENTION_NAME)
            self._build()
            same_place = (model.dtype, execution_device(model, self.name)) == (
                self.dtype,
                self.device,
            )
            now = [spec[:2] for spec in self.layers]
            if not same_place or self.vocab_size != vocab_size or now != shapes[: len(now)]:
                self._seen = None
                raise ValueError(
                    f"{self.name} has another dtype, device, vocabulary, or other attention heads "
                    "than when it was wrapped, and caches do not fit; wrap it in a new HFModel"
                )

    def _new_graphs(self) -> ForwardGraphs | None:
        """Graphs of this model's forward, where it can be captured."""
        if self._fused is None or self.device.type != "cuda":
            return None
        return ForwardGraphs(self._run)

    @contextmanager
    def _watched(self, layers: tuple[int, ...]) -> Iterator[dict[int, torch.Tensor]]:
        """Collects the outputs of decoder layers while they run."""
        features: dict[int, torch.Tensor] = {}
        handles = []
        for layer in layers:
            if layer != FINAL_HIDDEN:

                def keep(_: Any, __: Any, out: Any, layer: int = layer) -> None:
                    features[layer] = out[0] if isinstance(out, tuple) else out

                handles.append(self._decoder_layers()[layer].register_forward_hook(keep))
        try:
            yield features
        finally:
            for handle in handles:
                handle.remove()

    def _decoder_layers(self) -> torch.nn.ModuleList:
        return decoder_layers(self._model, len(self.layers), self.name)

    @contextmanager
    def plain(self) -> Iterator[PreTrainedModel]:
        """The model as Hugging Face made it (for ``generate``); `forward` fails meanwhile, and in
        other threads waits."""
        with self._lock:
            self._hand_back()
            try:
                yield self._model
            finally:
                self._take_over()

    def _check_against_plain(self) -> None:
        """For families that no test covers: one short text, by their modules, both ways."""
        length = min(12, self.context_length or 12)
        ids = (torch.arange(length, device=self.device) * 7919 % self.vocab_size).unsqueeze(0)
        # The products are ours both times: rounding could send a token to other experts.
        self._model.set_attn_implementation(self._plain_attention)
        try:
            with self._stable, torch.inference_mode():
                plain = self._model(input_ids=ids, use_cache=False).logits
        finally:
            self._model.set_attn_implementation(ATTENTION_NAME)
        none = torch.zeros(1, dtype=torch.int32, device=self.device)
        positions = torch.arange(length, device=self.device).unsqueeze(0)
        batch = ForwardBatch(ids, positions, none, none.view(1, 1))
        fused, self._fused = self._fused, None
        try:
            with trial_pass(self.name, self.config.model_type):
                paged = self.forward(batch, self._cache_of(1, 16, "auto")).logits
        finally:
            self._fused = fused
        routed = experts_implementation(self._model) is not None
        check_against_plain(plain, paged, self.name, self.config.model_type, routed=routed)


def _scored_rows(hidden: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
    """The rows of [B, N, H] whose logits are asked for: all, or [S, 1, H]."""
    if batch.scored is None:
        return hidden
    return hidden.flatten(0, 1)[batch.scored.to(hidden.device)].unsqueeze(1)


@contextmanager
def _head_input(
    head: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Changes what reaches the output head, for models that go on working behind it.

    Rather than ``logits_to_keep``, which takes the same rows of all sequences and which not every
    architecture has. Drafters of other threads may use the head meanwhile: theirs is left alone.
    """
    thread = threading.get_ident()

    def hook(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        return (change(args[0]),) if threading.get_ident() == thread else None

    handle = head.register_forward_pre_hook(hook)
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
