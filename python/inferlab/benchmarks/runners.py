"""What is measured: local baseline, server, engine (with drafts or plain), HF generate."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import LogitsProcessorList

from inferlab.baseline import ForbidPadding, LocalBaselineRunner
from inferlab.benchmarks.measure import MeasurementError
from inferlab.benchmarks.peers import hf
from inferlab.client.ping import VLLMPingClient
from inferlab.config import SpecdecConfig
from inferlab.models import TargetModel, format_of, plain_model, unknown_ids
from inferlab.models.generation_defaults import same_rule
from inferlab.records import RequestRecord
from inferlab.specdec.pipeline import GenerationError, Prompt, SpeculativePipeline
from inferlab.specdec.text import NewText, text_decoder
from inferlab.types import check_room, check_text


class LocalRunner:
    """Hugging Face ``generate`` as the local baseline runs it."""

    name = "LocalBaselineRunner"

    def __init__(self, baseline: LocalBaselineRunner) -> None:
        self.baseline = baseline

    def run(self, prompt: str) -> dict[str, Any]:
        return {**self.baseline.run(prompt)}

    def describe(self) -> dict[str, Any]:
        config = self.baseline.config
        return {
            "model": self.baseline.model_name,
            "device": self.baseline.device,
            "dtype": self.baseline.dtype,
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.effective_temperature,
            "seed": config.seed,
        }


class HTTPRunner:
    """An OpenAI-compatible server."""

    name = "VLLMPingClient"

    def __init__(self, client: VLLMPingClient, *, seed: int, stream: bool = False) -> None:
        self.client = client
        self.seed = seed
        self.stream = stream
        self._model: str | None = client.model

    def run(self, prompt: str) -> dict[str, Any]:
        result = self.client.generate(prompt, seed=self.seed, stream=self.stream)
        if not result["success"]:
            raise MeasurementError(result["error"])
        self._model = result["model"]
        return result

    def describe(self) -> dict[str, Any]:
        config = self.client.config
        return {
            "server": self.client.base_url,
            "model": self._model,
            "endpoint": config.endpoint,
            "stream": self.stream,
            "max_new_tokens": config.max_tokens,
            "temperature": config.temperature,
            "seed": self.seed,
        }


class SpecdecRunner:
    """The engine: speculative, or plain decoding with ``draft_mode="none"``."""

    name = "SpeculativePipeline"

    def __init__(self, pipeline: SpeculativePipeline) -> None:
        self.pipeline = pipeline

    def run(self, prompt: str) -> dict[str, Any]:
        try:
            result: dict[str, Any] = self.pipeline.generate(prompt)
        except GenerationError as error:  # its own text counts prompts, and here is one
            raise MeasurementError(_errors(error.results)[0]) from error
        return result

    def describe(self) -> dict[str, Any]:
        config = self.pipeline.config
        hf = config.implementation == "hf"
        return {
            "implementation": config.implementation,
            "device": self.pipeline.device,
            "dtype": format_of(self.pipeline.target),
            "base_model": self.pipeline.target.name,
            "draft_model": self.pipeline.draft_name if hf else None,
            "draft_mode": config.draft_mode,
            "max_draft": config.levels,
            "tree": list(config.tree) if isinstance(config.tree, tuple) else config.tree,
            "policy": self.pipeline.policy.describe(),
            "controller": self.pipeline.controller.describe(),
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.effective_temperature,
            "seed": config.seed,
        }


class BatchRunner:
    """The engine on one prompt or on several as one batch; figures of the batch as a whole."""

    name = "SpeculativePipeline"

    def __init__(self, pipeline: SpeculativePipeline) -> None:
        self.pipeline = pipeline

    def run(self, prompt: str | Sequence[Prompt]) -> dict[str, Any]:
        """As `Runner.run`, of a text, or of texts or token ids together; ``results`` are those of
        the prompts, in order. Those that failed while they ran are in ``errors``; the figures are
        those of the others.

        Raises:
            MeasurementError: all of them failed.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        clock = self.pipeline.engine.clock.totals
        before = dict(clock)
        begin = time.perf_counter()
        results: Sequence[Mapping[str, Any]]
        try:
            results = self.pipeline.generate(prompts)
        except GenerationError as error:
            results = error.results
        latency_ms = (time.perf_counter() - begin) * 1e3
        errors = _errors(results)
        good = [result for result in results if "error" not in result]
        if not good:
            raise MeasurementError(errors[0], errors)
        phases = {phase: ms - before[phase] for phase, ms in clock.items()}
        phases["rest"] = max(latency_ms - sum(phases.values()), 0.0)
        tokens = sum(result["num_tokens"] for result in good)
        return {
            "latency_ms": latency_ms,
            "num_tokens": tokens,
            "timings_ms": phases,
            "steps": sum(result["steps"] for result in good),
            "target_forwards": max(result["target_forwards"] for result in good),
            "results": results,
            "errors": errors,
        }

    def describe(self) -> dict[str, Any]:
        return SpecdecRunner(self.pipeline).describe()


def _errors(results: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Why requests of a batch failed, by their place in it."""
    return {place: str(one["error"]) for place, one in enumerate(results) if "error" in one}


class GenerateRunner:
    """Hugging Face ``generate`` on the engine's own weights: same device, dtype and prompt ids.

    Its time is that of ``generate`` alone, as the engine's is that of decoding alone; both begin
    with token ids and end with token ids.

    Args:
        assistant: the draft model of Hugging Face's assisted generation.
        lookup: tokens drafted by Hugging Face's prompt lookup.
    """

    name = "HuggingFaceGenerate"

    def __init__(
        self,
        target: TargetModel,
        config: SpecdecConfig,
        *,
        assistant: TargetModel | None = None,
        lookup: int | None = None,
    ) -> None:
        self.target = target
        self.config = config
        self.assistant = assistant
        self.lookup = lookup

    @torch.inference_mode()
    def run(self, prompt: str) -> dict[str, Any]:
        tokenizer = self.target.tokenizer
        device = self.target.device
        check_text("prompt", prompt)
        ids = tokenizer.encode(prompt)
        limit = self.target.context_length
        check_room("max_tokens", len(ids), self.config.max_new_tokens, limit, self.target.name)
        with (
            plain_model(self.target, self.name) as model,
            self._assistant() as assistant,
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            same_rule(model, ignore=self.config.ignore_generation_config),
        ):
            torch.manual_seed(self.config.seed)
            (new_ids,), latency_ms = hf.decode(
                model, [ids], self._options(), assistant=assistant, lookup=self.lookup
            )
        record = RequestRecord(
            source="generate",
            model=self.target.name,
            device=str(device),
            dtype=format_of(self.target),
            prompt=prompt,
            prompt_tokens=len(ids),
            max_tokens=self.config.max_new_tokens,
            temperature=self.config.effective_temperature,
            seed=self.config.seed,
            text=NewText(text_decoder(tokenizer), ids).of(new_ids),
            token_ids=new_ids,
            num_tokens=len(new_ids),
            counted_by="ids",
            started_at=time.time() - latency_ms / 1e3,
            latency_ms=latency_ms,
        )
        result: dict[str, Any] = {
            "text": record.text,
            "token_ids": new_ids,
            "num_tokens": record.num_tokens,
            "latency_ms": latency_ms,
            "tokens_per_second": record.tokens_per_second,
            "record": record.as_json(),
        }
        if self.assistant is None and self.lookup is None:
            # One forward per token: the first of them is that of the prompt.
            result["target_forwards"] = len(new_ids)
        return result

    def _assistant(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.assistant is None else plain_model(self.assistant, self.name)

    def describe(self) -> dict[str, Any]:
        return {"model": self.target.name, "attention": "the model's own", "use_cache": True}

    def _options(self) -> dict[str, Any]:
        config = self.config
        options: dict[str, Any] = {
            "max_new_tokens": config.max_new_tokens,
            "pad_token_id": self._pad_token_id(),
            **hf.sampling_options(
                config.effective_temperature, config.top_k, config.top_p, config.min_p
            ),
        }
        # Left out, they are the checkpoint's, see `same_rule`.
        for name in ("min_new_tokens", "repetition_penalty"):
            if name in config.model_fields_set:
                options[name] = getattr(config, name)
        unknown = unknown_ids(self.target.tokenizer, self.target.vocab_size)
        if unknown:
            options["logits_processor"] = LogitsProcessorList([ForbidPadding(unknown)])
        if config.stop:
            options.update(stop_strings=list(config.stop), tokenizer=self.target.tokenizer)
        return options

    def _pad_token_id(self) -> int:
        pad = self.target.tokenizer.pad_token_id
        return pad if pad is not None else next(iter(self.target.eos_token_ids), 0)


def plain_config(config: SpecdecConfig) -> SpecdecConfig:
    """The same model with the same sampling, without drafts."""
    return config.model_copy(
        update={"draft_mode": "none", "tree": None, "policy": "longest_prefix", "record": None}
    )


def plain_pipeline(pipeline: SpeculativePipeline) -> SpeculativePipeline:
    """The same engine on the same model with the same sampling, without drafts."""
    return SpeculativePipeline(config=plain_config(pipeline.config), target=pipeline.target)
