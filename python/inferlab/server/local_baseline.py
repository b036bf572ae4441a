"""Plain decoding by Hugging Face `generate`: what speculation is measured against."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from inferlab.cli_common import (
    add_config_argument,
    add_generation_config_argument,
    add_output_arguments,
    add_prompt_arguments,
    add_safety_arguments,
    check_output,
    clean_stdout,
    command_main,
    gather_prompts,
    given_values,
    setup_logging,
)
from inferlab.cli_results import report, run_prompts, show_heading, show_line, show_text
from inferlab.config import BaselineConfig, choices, load_config
from inferlab.models import loading
from inferlab.models.architecture import logits_width
from inferlab.models.base import unknown_ids
from inferlab.models.forked import use_threads_that_exist
from inferlab.models.generation_defaults import same_rule, warn_of_not_followed
from inferlab.models.rotary import context_length
from inferlab.specdec.text import NewText, text_decoder
from inferlab.types import check_text

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of a text; ``results`` holds what there was of it."""

    def __init__(self, results: list[dict[str, Any]]) -> None:
        super().__init__("generation interrupted")
        self.results = results


class _Collector:
    """A streamer for `generate` that remembers the new tokens, so that Ctrl-C loses none."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self._seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._seen_prompt:
            self.token_ids += value.reshape(-1).tolist()
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
        model_name: hub id, local directory or bundled name; beats the file's ``model``. ``model``
            is another name of it.
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
            model = overrides.setdefault("model", model_name)
            if model_name not in (None, model):
                raise ValueError(
                    f"model_name is {model_name!r} and model is {model!r}, which are two names of "
                    "one thing; give one"
                )
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
    ) -> dict[str, Any]:
        """Decodes one prompt; what is not given is the configuration's.

        Args:
            prompt: the text to go on from.
            max_new_tokens: new tokens at most.
            temperature: 0 is greedy; so is ``do_sample=False``.
            top_p, top_k: filters; without them those of the model's generation configuration.
            seed: of torch's generator, for this call only; the state around it is left alone.
            keep_partial: on Ctrl-C raise Interrupted with the tokens so far (costs a copy of each
                token to the host).

        Returns:
            A mapping with

            * ``text``: the prompt **and** what follows it; ``completion``: what follows alone;
              ``token_ids``: the new tokens only; ``num_tokens``: their number;
            * ``latency_ms``: tokenizing, decoding and detokenizing; ``tokens_per_second`` (also as
              ``tokens_per_sec``): new tokens over that time;
            * ``prompt``, ``max_new_tokens``, ``finish_reason``, ``model``, ``device``, ``dtype``,
              ``temperature``, ``seed``.

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
        collector = _Collector()
        try:
            output = self._generate(inputs, config, collector if keep_partial else None)
            token_ids: list[int] = output[0, prompt_length:].tolist()
            reason = "length" if len(token_ids) >= config.max_new_tokens else "stop"
        except KeyboardInterrupt as interrupt:
            token_ids, reason = collector.token_ids, "interrupted"
            if not keep_partial:
                raise
            raise Interrupted(
                [self._result(prompt, inputs, token_ids, reason, start, config)]
            ) from interrupt
        return self._result(prompt, inputs, token_ids, reason, start, config)

    def _check_length(self, prompt_length: int, max_new_tokens: int) -> None:
        if prompt_length == 0:
            raise ValueError("prompt is empty; it must have at least one token")
        limit = self.context_length
        if limit is not None and prompt_length + max_new_tokens > limit:
            room = limit - prompt_length
            remedy = f" or ask for at most {room} new tokens" if room > 0 else ""
            raise ValueError(
                f"prompt ({prompt_length} tokens) and max_new_tokens ({max_new_tokens}) exceed the "
                f"context of {self.model_name} ({limit} tokens); shorten the prompt{remedy}"
            )

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
    ) -> dict[str, Any]:
        prompt_ids = inputs["input_ids"][0].tolist()
        decode = text_decoder(self.tokenizer)
        text = decode(prompt_ids + token_ids)
        latency_ms = (time.perf_counter() - start) * 1e3
        rate = len(token_ids) / (latency_ms / 1e3)
        return {
            "text": text,
            "completion": NewText(decode, prompt_ids).of(token_ids),
            "token_ids": token_ids,
            "num_tokens": len(token_ids),
            "latency_ms": latency_ms,
            "tokens_per_second": rate,
            "tokens_per_sec": rate,
            "prompt": prompt,
            "max_new_tokens": config.max_new_tokens,
            "finish_reason": reason,
            "model": self.model_name,
            "device": self.device,
            "dtype": self.dtype,
            "temperature": config.effective_temperature,
            "seed": config.seed,
        }


# --- inferlab baseline --------------------------------------------------------------------------

FLAGS = {
    "--model": "model",
    "--max-tokens": "max_new_tokens",
    "--temperature": "temperature",
    "--top-p": "top_p",
    "--top-k": "top_k",
    "--seed": "seed",
    "--device": "device",
    "--dtype": "torch_dtype",
    "--max-memory-mb": "max_memory_mb",
    "--ignore-generation-config": "ignore_generation_config",
    "--trust-remote-code": "trust_remote_code",
    "--allow-pickle": "allow_pickle",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab baseline``."""
    add_prompt_arguments(parser)
    add_config_argument(parser, "configs/baseline.yaml")
    parser.add_argument(
        "--model", metavar="NAME", help="hub id, directory or bundled name (default: inferlab/tiny)"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="new tokens at most (48)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (0.7)")
    parser.add_argument("--top-p", type=float, help="nucleus (the model's own)")
    parser.add_argument(
        "--top-k", type=int, help="keep the k likeliest; 0 is off (the model's own)"
    )
    parser.add_argument("--seed", type=int, help="of the sampling (1234)")
    add_generation_config_argument(parser)
    parser.add_argument("--device", help="auto, cpu, mps, cuda or cuda:N (auto)")
    parser.add_argument("--dtype", choices=choices(BaselineConfig, "torch_dtype"), help="(float32)")
    add_safety_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab baseline``; returns the exit code."""
    overrides, names = given_values(args, FLAGS)
    config = load_config(BaselineConfig, args.config, overrides, names=names)
    check_output(args.output)
    prompts = gather_prompts(args)
    setup_logging(config.log_level, args.verbose)
    with clean_stdout(args.json) as out:
        runner = LocalBaselineRunner(config=config)
        collected = run_prompts(
            prompts, lambda texts: [runner.run(text, keep_partial=True) for text in texts], args
        )
        return report(collected, args, out, _show)


def _show(result: dict[str, Any]) -> None:
    if "id" in result:
        show_heading(str(result["id"]))
    if "error" in result:
        show_line([f"error: {result['error']}"])
        return
    show_text(result["text"])
    show_line(
        [
            f"{result['model']}, {result['dtype']}, {result['device']}",
            f"{result['num_tokens']} tokens ({result['finish_reason']})",
            f"{result['latency_ms']:.1f} ms",
            f"{result['tokens_per_second']:.1f} tokens/s",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m inferlab.server.local_baseline``."""
    return command_main(
        "baseline", "Decode plainly, by Hugging Face generate.", add_arguments, run, argv
    )


if __name__ == "__main__":
    sys.exit(main())
