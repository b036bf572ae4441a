"""The measuring loop: several ways to decode, interleaved, so that drift of the machine cancels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from inferlab.errors import describe_error

logger = logging.getLogger(__name__)

FIGURES = (
    "acceptance_rate", "mean_accepted_length", "target_forwards", "first_token_ms", "ttft_ms",
    "tpot_ms",
)  # fmt: skip
"""What some runners measure beside time and tokens."""


class MeasurementError(RuntimeError):
    """One measurement failed; the text says why."""


class Runner(Protocol):
    """One way to decode a prompt."""

    name: str

    def run(self, prompt: str) -> dict[str, Any]:
        """Decodes; the mapping has at least ``latency_ms`` and ``num_tokens``.

        Raises:
            ValueError, RuntimeError: it failed; what came of it does not count.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Models, device, server: what belongs beside the figures."""
        ...


@dataclass(frozen=True)
class Run:
    """One measurement: ``result`` of the runner ``mode``, or the ``error`` that came instead.

    ``order`` is the place (0 first) that it had among the modes of its prompt and iteration.
    """

    mode: str
    prompt_index: int
    iteration: int
    order: int
    result: dict[str, Any] | None = None
    error: str | None = None

    def row(self) -> dict[str, Any]:
        """The figures of the run, flat."""
        row: dict[str, Any] = {
            "mode": self.mode,
            "prompt_index": self.prompt_index,
            "iteration": self.iteration,
            "order": self.order,
        }
        if self.result is None:
            return {**row, "error": self.error}
        latency_ms, tokens = float(self.result["latency_ms"]), int(self.result["num_tokens"])
        row.update(
            latency_ms=latency_ms,
            num_tokens=tokens,
            tokens_per_second=tokens / latency_ms * 1e3,
            ms_per_token=latency_ms / tokens,
        )
        row.update(
            {
                key: self.result[key]
                for key in (*FIGURES, "perplexity")
                if self.result.get(key) is not None
            }
        )
        return row


@dataclass
class Measurements:
    """All runs so far, in the order in which they were made."""

    runs: list[Run] = field(default_factory=list)
    interrupted: bool = False

    def of(self, mode: str, prompt_index: int | None = None) -> list[Run]:
        """The runs of a mode that succeeded, of one prompt or of all."""
        return [
            run
            for run in self.runs
            if run.mode == mode
            and run.error is None
            and (prompt_index is None or run.prompt_index == prompt_index)
        ]

    def failures(self, mode: str | None = None) -> list[Run]:
        """The runs that failed, of one mode or of all."""
        return [run for run in self.runs if run.error is not None and mode in (None, run.mode)]


def measure(
    runners: Mapping[str, Runner],
    prompts: Sequence[str],
    *,
    iterations: int,
    warmup: int,
    on_run: Callable[[int], None] | None = None,
) -> Measurements:
    """Runs every mode on every prompt, ``iterations`` times.

    Modes take turns prompt by prompt (A B C, B C A, C A B, ...), and on each prompt from iteration
    to iteration: a machine that slows down slows all of them, and none always goes first. Warm-up
    runs go over the first prompts and are not kept. A run that fails, whatever the reason, is kept
    as a failure and the others go on. Ctrl-C ends the loop with what there is; the run that it hit
    is not kept.

    Args:
        on_run: called with 1 after each run, warm-up included.
    """
    modes = list(runners)
    kept = Measurements()
    try:
        for index in range(warmup):
            for mode in modes:
                _run_once(runners[mode], mode, prompts[index % len(prompts)], 0, 0, 0)
                if on_run is not None:
                    on_run(1)
        for iteration in range(iterations):
            for index, prompt in enumerate(prompts):
                first = (iteration + index) % len(modes)
                for order in range(len(modes)):
                    mode = modes[(first + order) % len(modes)]
                    run = _run_once(runners[mode], mode, prompt, index, iteration, order)
                    kept.runs.append(run)
                    if on_run is not None:
                        on_run(1)
    except KeyboardInterrupt:
        kept.interrupted = True
    return kept


def _run_once(
    runner: Runner, mode: str, prompt: str, index: int, iteration: int, order: int
) -> Run:
    try:
        result = runner.run(prompt)
        if not result["num_tokens"] or not result["latency_ms"] > 0:
            raise MeasurementError("no token was generated")
    except Exception as error:
        text = describe_error(error)
        logger.warning("%s, prompt %d, iteration %d: %s", mode, index, iteration, text)
        logger.debug("the traceback", exc_info=error)
        return Run(mode, index, iteration, order, error=text)
    logger.debug(
        "%s, prompt %d, iteration %d: %d tokens in %.2f ms",
        mode, index, iteration, result["num_tokens"], result["latency_ms"],
    )  # fmt: skip
    return Run(mode, index, iteration, order, result=result)
