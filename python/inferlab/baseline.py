"""Plain decoding by Hugging Face `generate`: what speculation is measured against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from inferlab.config import BaselineConfig, load_config
from inferlab.errors import Interrupted
from inferlab.models import loading
from inferlab.models.architecture import logits_width
from inferlab.models.base import unknown_ids
from inferlab.models.forked import use_threads_that_exist
from inferlab.models.generation_defaults import same_rule, warn_of_not_followed
from inferlab.models.rotary import context_length
from inferlab.records import BaselineResult, RequestRecord
from inferlab.specdec.text import NewText, TextStream, text_decoder, unsettled_tokens
from inferlab.types import check_room, check_text


class _Collector:
    """A streamer for `generate` that remembers the new tokens, so that Ctrl-C loses none.

    Args:
        tell: called with each new token.
    """

    def __init__(self, tell: Callable[[list[int]], None]) -> None:
        self.token_ids: list[int] = []
        self._tell = tell
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._seen_prompt:
            new = value.reshape(-1).tolist()
            self.token_ids += new
            self._tell(new)
        self._seen_prompt = True

    def end(self) -> None:
        """Part of the streamer's interface; there is nothing to flush."""


class _RefuseNan(LogitsProcessor):
    """Without it NaN logits decode greedily to token 0, often the end of text, in silence."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # NaN if any score is; -inf if all are.
        highest = scores.max()
        if highest.isnan() or highest == float("-inf"):
            raise ValueError(
                f"the logits of {self._model_name} at position {input_ids.shape[1]} are NaN or "
                f"all -inf; no token can be chosen from them"
            )
        return scores


class ForbidPadding(LogitsProcessor):
    """Ids that the tokenizer lacks are never chosen, as in the engine.

    Args:
        ids: from `unknown_ids`.
    """

    def __init__(self, ids: list[int]) -> None:
        self._ids = torch.tensor(ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._ids = self._ids.to(scores.device)
        return scores.index_fill(-1, self._ids, -torch.inf)


class LocalBaselineRunner:
    """A model with its tokenizer, decoded by Hugging Face ``generate`` and nothing else.

    Values come from keywords, else from the YAML file, else from the defaults of
    :class:`inferlab.config.BaselineConfig` (the bundled ``inferlab/tiny``).

    Args:
        config_path: a ``baseline`` YAML file; ``configs/NAME.yaml`` is found from anywhere.
        model_name: hub id, local directory or bundled name; beats the file's ``model``. As a
            keyword it may also be called ``model``, as in the file.
        overrides: any other key of BaselineConfig (``torch_dtype``, ``device``, ``seed``, ...).
        config: a configuration made elsewhere, in place of all of the above.

    Raises:
        ConfigError: an unknown key or a value that is not allowed.
        ValueError, FileNotFoundError: a model that cannot be loaded.
    """

    def __init__(
        self,
        config_path: str | None = None,
        model_name: str | None = None,
        *,
        config: BaselineConfig | None = None,
        **overrides: Any,
    ) -> None:
        if config is None:
            if model_name is not None:
                if overrides.get("model", model_name) != model_name:
                    raise ValueError("model and model_name are two names of one value; give one")
                overrides["model"] = model_name
            config = load_config(BaselineConfig, config_path, overrides)
        self.config = config
        self.model_name = config.model
        loaded = loading.load(
            config.model,
            device=config.device,
            dtype=config.torch_dtype,
            device_priority=config.device_priority,
            max_memory_mb=config.max_memory_mb,
            trust_remote_code=config.trust_remote_code,
            allow_pickle=config.allow_pickle,
        )
        self.model: Any = loaded.model.eval()
        self.tokenizer: Any = loaded.tokenizer
        self._processors = LogitsProcessorList([_RefuseNan(config.model)])
        unknown = unknown_ids(self.tokenizer, logits_width(self.model))
        if unknown:
            self._processors.insert(0, ForbidPadding(unknown))
        if not config.ignore_generation_config:
            warn_of_not_followed(self.model, self.model_name)

    @property
    def device(self) -> str:
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def context_length(self) -> int | None:
        """The longest sequence in tokens, None where the model sets no limit."""
        config = self.model.config.get_text_config(decoder=True)
        return context_length(config)

    def run(
        self,
        prompt: str,
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        do_sample: bool | None = None,
        keep_partial: bool = False,
        on_text: Callable[[str], None] | None = None,
    ) -> BaselineResult:
        """Decodes one prompt; what is not given is the configuration's.

        Args:
            prompt: the text to go on from.
            max_new_tokens: new tokens at most.
            temperature: 0 is greedy; so is ``do_sample=False``.
            top_p, top_k: filters; without them those of the model's generation configuration.
            seed: of torch's generator, for this call only; the state around it is left alone.
            keep_partial: on Ctrl-C raise Interrupted with the tokens so far (costs a copy of each
                token to the host).
            on_text: called with the text as it comes: the prompt, then what follows it.

        Returns:
            A mapping with

            * ``text``: the prompt **and** what follows it; ``completion``: what follows alone;
              ``token_ids``: the new tokens only; ``num_tokens``: their number;
            * ``latency_ms``: tokenizing, decoding and detokenizing; ``tokens_per_second`` (also as
              ``tokens_per_sec``): new tokens over that time;
            * ``prompt``, ``max_new_tokens``, ``finish_reason``, ``model``, ``device``, ``dtype``,
              ``temperature``, ``seed``; ``record``: what these are read off, as JSON types;
              :func:`inferlab.record_of` makes a :class:`inferlab.RequestRecord` of it.

        Raises:
            ConfigError: a value out of range.
            ValueError: a prompt that is empty or cannot be encoded, or more tokens than the model's
                context holds.
        """
        values = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "seed": seed,
            "do_sample": do_sample,
        }
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            config = load_config(BaselineConfig, None, {**self.config.model_dump(), **given})
            if temperature is not None and do_sample is None:
                config = config.model_copy(update={"do_sample": True})
        else:
            config = self.config

        check_text("prompt", prompt)
        use_threads_that_exist()
        start = time.perf_counter()
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        prompt_length = int(inputs["input_ids"].shape[1])
        self._check_length(prompt_length, config.max_new_tokens)
        stream = TextStream(
            NewText(text_decoder(self.tokenizer), inputs["input_ids"][0].tolist()),
            unsettled=unsettled_tokens(self.tokenizer),
        )

        def tell(new: list[int]) -> None:
            if on_text is not None:
                on_text(stream.add(new))

        if on_text is not None:
            on_text(prompt)
        collector = _Collector(tell)
        try:
            wanted = keep_partial or on_text is not None
            output = self._generate(inputs, config, collector if wanted else None)
            token_ids: list[int] = output[0, prompt_length:].tolist()
            reason = "length" if len(token_ids) >= config.max_new_tokens else "stop"
        except KeyboardInterrupt as interrupt:
            token_ids, reason = collector.token_ids, "interrupted"
            if not keep_partial:
                raise
            raise Interrupted(
                [self._result(prompt, inputs, token_ids, reason, start, config)]
            ) from interrupt
        result = self._result(prompt, inputs, token_ids, reason, start, config)
        if on_text is not None:
            on_text(stream.end(result["completion"]))
        return result

    def _check_length(self, prompt_length: int, max_new_tokens: int) -> None:
        if prompt_length == 0:
            raise ValueError("prompt is empty; it must have at least one token")
        limit = self.context_length
        check_room("max_new_tokens", prompt_length, max_new_tokens, limit, self.model_name)

    @torch.inference_mode()
    def _generate(
        self, inputs: Any, config: BaselineConfig, streamer: _Collector | None
    ) -> torch.Tensor:
        greedy = config.effective_temperature == 0.0
        options: dict[str, Any] = {"do_sample": not greedy}
        if not greedy:
            options["temperature"] = config.temperature
            if config.top_p is not None:
                options["top_p"] = config.top_p
            if config.top_k is not None:
                options["top_k"] = config.top_k
        else:  # silences a warning about settings of the checkpoint that greedy does not use
            options.update(temperature=None, top_p=None, top_k=None)
        pad = self.tokenizer.pad_token_id
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            same_rule(self.model, ignore=config.ignore_generation_config),
        ):
            torch.manual_seed(config.seed)
            output: torch.Tensor = self.model.generate(
                **inputs,
                max_new_tokens=config.max_new_tokens,
                pad_token_id=pad if pad is not None else self.tokenizer.eos_token_id,
                streamer=streamer,
                logits_processor=self._processors,
                **options,
            )
        return output

    def _result(
        self,
        prompt: str,
        inputs: Any,
        token_ids: list[int],
        reason: str,
        start: float,
        config: BaselineConfig,
    ) -> BaselineResult:
        prompt_ids = inputs["input_ids"][0].tolist()
        decode = text_decoder(self.tokenizer)
        text = decode(prompt_ids + token_ids)
        completion = NewText(decode, prompt_ids).of(token_ids)
        latency_ms = (time.perf_counter() - start) * 1e3
        record = RequestRecord(
            source="baseline",
            model=self.model_name,
            device=self.device,
            dtype=self.dtype,
            prompt=prompt,
            prompt_tokens=len(prompt_ids),
            max_tokens=config.max_new_tokens,
            temperature=config.effective_temperature,
            seed=config.seed,
            text=completion,
            token_ids=token_ids,
            num_tokens=len(token_ids),
            counted_by="ids",
            finish_reason=reason,
            started_at=time.time() - latency_ms / 1e3,
            latency_ms=latency_ms,
        )
        return result_mapping(record, text)


def result_mapping(record: RequestRecord, text: str) -> BaselineResult:
    """The record under the names that users know; ``text`` is prompt and completion."""
    r: Any = record  # the runner fills the fields that may be None
    return {
        "text": text,
        "completion": r.text,
        "token_ids": r.token_ids,
        "num_tokens": r.num_tokens,
        "latency_ms": r.latency_ms,
        "tokens_per_second": r.tokens_per_second,
        "tokens_per_sec": r.tokens_per_second,
        "prompt": r.prompt,
        "max_new_tokens": r.max_tokens,
        "finish_reason": r.finish_reason,
        "model": r.model,
        "device": r.device,
        "dtype": r.dtype,
        "temperature": r.temperature,
        "seed": r.seed,
        "record": record.as_json(),
    }
