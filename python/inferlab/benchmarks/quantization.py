"""Formats of weights and of K/V side by side: `inferlab bench --quantization-matrix`.

Every format of the target alone, and with every format of its draft model, take turns on each
prompt. A target of another format is another target: its tokens are compared with the unquantised
one's to say how far they agree, not whether they are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from statistics import median
from time import perf_counter
from typing import Any

import torch

from inferlab.benchmarks.comparison import batch_rows, figures_of, speculation_of, speedup
from inferlab.benchmarks.environment import describe_environment
from inferlab.benchmarks.measure import Measurements, Runner, measure
from inferlab.benchmarks.names import FORWARD_ROWS
from inferlab.benchmarks.outputs import (
    MatrixSettings,
    MatrixStats,
    PairFigures,
    Speedup,
    TargetFigures,
)
from inferlab.benchmarks.peers import hf
from inferlab.benchmarks.perplexity import own_log_probabilities, perplexity
from inferlab.benchmarks.runners import BatchRunner
from inferlab.config import SpecdecConfig
from inferlab.errors import describe_error
from inferlab.models import ForwardBatch, format_of, quantized
from inferlab.models.kv_cache import PAGE_FORMATS
from inferlab.specdec.pipeline import SpeculativePipeline

NONE = "none"
FORMATS = (NONE, *quantized.FORMATS)
KV_FORMATS = {f"{NONE}, {name} K/V": name for name in PAGE_FORMATS}
"""Of the target's pages, with its weights as they are."""
PREFIX = 64  # tokens behind it
ROUNDS = 15


class QuantizationMatrix:
    """Measures every format of the target, and of the draft model where the mode has one.

    Args:
        config: of models, mode, sampling and controller; its formats are ignored.

    Raises:
        ValueError: the models have no weights, or cannot be packed.
    """

    def __init__(self, config: SpecdecConfig) -> None:
        if config.implementation != "hf":
            raise ValueError(
                "--quantization-matrix needs models with weights; leave out --impl, or set it to hf"
            )
        self.config = config
        self._has_draft = config.draft_mode == "vanilla"  # a model with a format of its own
        self._plain: dict[str, SpeculativePipeline] = {}
        self._pairs: dict[tuple[str, str], SpeculativePipeline] = {}
        drafts: dict[str, Any] = {}
        config = config.model_copy(update={"kv_cache_dtype": "auto"})
        alone = {"draft_mode": "none", "tree": None}
        for target in FORMATS:
            wanted = {**alone, "quantization": target}
            self._plain[target] = SpeculativePipeline(config=config.model_copy(update=wanted))
            for draft in FORMATS if self._has_draft else (NONE,):
                update = {"quantization": target, "draft_quantization": draft}
                pair = SpeculativePipeline(
                    config=config.model_copy(update=update),
                    target=self._plain[target].target,
                    draft=drafts.get(draft),
                )
                drafts[draft] = pair.draft_model
                self._pairs[target, draft] = pair
        unquantized: Any = self._plain[NONE].target
        for name, stored in KV_FORMATS.items():
            wanted = {**alone, "quantization": NONE, "kv_cache_dtype": stored}
            self._plain[name] = SpeculativePipeline(
                config=config.model_copy(update=wanted), target=unquantized.with_pages_of(stored)
            )

    def num_runs(self, num_prompts: int) -> int:
        """How many runs `run` makes, warm-up included."""
        each = num_prompts * self.config.iterations + self.config.warmup_iterations
        return (len(self._plain) + len(self._pairs)) * each

    def run(
        self,
        prompts: Sequence[str],
        on_run: Callable[[int], None] | None = None,
        keep: Callable[[dict[str, Any]], None] | None = None,
    ) -> MatrixStats:
        """Measures ``config.iterations`` rounds over the prompts.

        Args:
            on_run: called with the number of runs made since it was called last.
            keep: called with the row of each run as soon as it is made.

        Raises:
            ValueError: a prompt that cannot be decoded.
        """
        for index, prompt in enumerate(prompts):
            try:
                self._plain[NONE].check(prompt)
            except ValueError as error:
                raise ValueError(f"prompt {index}: {describe_error(error)}") from error
        forwards = self._forward_ms()
        runners: dict[str, Runner] = {
            **{_alone(name): BatchRunner(pipeline) for name, pipeline in self._plain.items()},
            **{_both(*key): BatchRunner(pipeline) for key, pipeline in self._pairs.items()},
        }
        measured = measure(
            runners,
            list(prompts),
            iterations=self.config.iterations,
            warmup=self.config.warmup_iterations,
            on_run=on_run,
            keep=None if keep is None else lambda run: keep(run.row()),
        )
        count = len(prompts)
        targets = {
            name: self._target_figures(measured, name, forwards[name], prompts)
            for name in self._plain
            if measured.of(_alone(name))
        }
        pairs = [
            self._pair_figures(measured, *key, count)
            for key in self._pairs
            if measured.of(_both(*key))
        ]
        rows: Any = batch_rows(measured, [[index] for index in range(count)], 1)
        failures: Any = [run.row() for run in measured.failures()]
        environment: Any = describe_environment()
        return {
            "environment": environment,
            "settings": self._settings(count),
            "targets": targets,
            "pairs": pairs,
            "prompts": list(prompts),
            "runs": rows,
            "failures": failures,
            "interrupted": measured.interrupted,
        }

    def _target_figures(
        self,
        measured: Measurements,
        name: str,
        forward_ms: dict[str, float],
        prompts: Sequence[str],
    ) -> TargetFigures:
        target = self._plain[name].target
        scores: list[float] = []
        for prompt in prompts:
            ids = target.tokenizer.encode(prompt)
            if len(ids) > 1:
                scores += own_log_probabilities(target, ids)
        same, first = 0, []
        for index in range(len(prompts)):
            own, other = _tokens(measured, name, index), _tokens(measured, NONE, index)
            if own is None or other is None:
                continue
            places = (i for i, (a, b) in enumerate(zip_longest(own, other)) if a != b)
            place = next(places, None)
            same += place is None
            first += [] if place is None else [place]
        return {
            "weights_mb": weights_mb(target),
            "kv_bytes_per_token": target.new_cache(1).bytes_per_token,
            "forward_ms": forward_ms,
            "perplexity": perplexity(scores) if scores else None,
            "tokens_per_second": _tokens_per_second(measured, _alone(name)),
            "x_unquantized": self._speedup(measured, _alone(name), _alone(NONE), len(prompts)),
            "same_tokens": same,
            "compared": same + len(first),
            "first_difference": float(median(first)) if first else None,
        }

    def _pair_figures(
        self, measured: Measurements, target: str, draft: str, count: int
    ) -> PairFigures:
        mode = _both(target, draft)
        stats = speculation_of(measured, mode)
        model = self._pairs[target, draft].draft_model
        return {
            "target": target,
            "draft": draft,
            "draft_mb": weights_mb(model) if self._has_draft else None,
            "accepted_length": None if stats is None else stats.mean_accepted_length,
            "tokens_per_second": _tokens_per_second(measured, mode),
            "x_plain": self._speedup(measured, mode, _alone(target), count),
            "x_unquantized": self._speedup(measured, mode, _alone(NONE), count),
        }

    @staticmethod
    def _speedup(measured: Measurements, mode: str, over: str, count: int) -> Speedup | None:
        found: Any = speedup(measured, mode, over, count) if mode != over else None
        return found

    def _forward_ms(self) -> dict[str, dict[str, float]]:
        """Medians of one forward of so many rows behind `PREFIX` tokens, in turns; of no more than
        the context has room for."""
        limit = self._plain[NONE].target.context_length
        room = max(FORWARD_ROWS) if limit is None else limit - PREFIX
        times: dict[tuple[str, int], list[float]] = {}
        pages = -(-(PREFIX + max(FORWARD_ROWS)) // 16)
        table = torch.arange(pages, dtype=torch.int32)[None]
        lens = torch.tensor([PREFIX], dtype=torch.int32)
        caches = {name: plain.target.new_cache(pages) for name, plain in self._plain.items()}
        for _ in range(ROUNDS):
            for rows in (n for n in FORWARD_ROWS if n <= room):
                tokens = torch.arange(rows)[None] % self._plain[NONE].target.vocab_size
                positions = PREFIX + torch.arange(rows)[None]
                batch = ForwardBatch(tokens, positions, lens, table)
                for name, plain in self._plain.items():
                    begin = perf_counter()
                    plain.target.forward(batch, caches[name])
                    times.setdefault((name, rows), []).append((perf_counter() - begin) * 1e3)
        return {
            name: {str(rows): median(ms) for (of, rows), ms in times.items() if of == name}
            for name in self._plain
        }

    def _settings(self, num_prompts: int) -> MatrixSettings:
        config = self.config
        return {
            "base_model": self._plain[NONE].target.name,
            "draft_model": next(iter(self._pairs.values())).draft_name,
            "draft_mode": config.draft_mode,
            "device": str(self._plain[NONE].target.device),
            "dtype": format_of(self._plain[NONE].target),
            "controller": config.controller_name,
            "prompts": num_prompts,
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.effective_temperature,
            "seed": config.seed,
            "iterations": config.iterations,
        }


def weights_mb(model: Any) -> float:
    """MB (2^20 bytes) of a model's weights, shared ones once."""
    return hf.weights_mb(model.model)


def _alone(target: str) -> str:
    return f"{target}, plain"


def _both(target: str, draft: str) -> str:
    return f"{target}, draft {draft}"


def _tokens(measured: Measurements, name: str, index: int) -> list[int] | None:
    runs = measured.of(_alone(name), index)
    result = runs[0].result if runs else None
    return None if result is None else list(result["results"][0]["token_ids"])


def _tokens_per_second(measured: Measurements, mode: str) -> float:
    return float(figures_of(measured, mode)["tokens_per_second"]["median"])
