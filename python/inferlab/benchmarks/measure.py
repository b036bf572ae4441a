"""The measuring loop: several ways to decode, interleaved, so that drift of the machine cancels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from inferlab.errors import describe_error
from inferlab.records import RecordJson, RequestRecord, tokens_per_second
from inferlab.types import SpeculationStats

logger = logging.getLogger(__name__)

FIGURES = (
    "acceptance_rate", "mean_accepted_length", "target_forwards", "first_token_ms", "ttft_ms",
    "tpot_ms", "energy_j",
)  # fmt: skip
"""What some runners measure beside time and tokens."""


class MeasurementError(RuntimeError):
    """One measurement failed; the text says why. Of a batch ``errors`` says it of each prompt, by
    its place in the batch."""

    def __init__(self, message: str, errors: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.errors = dict(errors or {})


class RunnerGone(MeasurementError):
    """A runner can go on no more; its mode is left out from here on."""


class Runner(Protocol):
    """One way to decode a prompt."""

    name: str

    def run(self, prompt: str) -> dict[str, Any]:
        """Decodes; the mapping has at least ``latency_ms`` and ``num_tokens``. Of a batch some of
        whose prompts failed, ``errors`` says why, by their place in the batch.

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
    ``errors``: of a batch, why prompts of it failed, by their place in it. An answer that is empty
    but finished is a result: no tokens, and no time per token.
    """

    mode: str
    prompt_index: int
    iteration: int
    order: int
    result: dict[str, Any] | None = None
    error: str | None = None
    errors: dict[int, str] = field(default_factory=dict)

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
        row.update(_time_figures(float(self.result["latency_ms"]), int(self.result["num_tokens"])))
        row.update(
            {
                key: self.result[key]
                for key in (*FIGURES, "perplexity")
                if self.result.get(key) is not None
            }
        )
        return row

    @property
    def records(self) -> list[RecordJson]:
        """Of its requests that succeeded: one, or those of a batch."""
        results = (self.result or {}).get("results", (self.result or {},))
        return [one["record"] for one in results if "record" in one and "error" not in one]


def record_figures(record: RequestRecord) -> dict[str, float]:
    """The figures of a request, under the names that rows have; what is not known is left out."""
    figures = _time_figures(record.latency_ms, record.num_tokens)
    first = "ttft_ms" if record.source == "http" else "first_token_ms"
    known = {first: record.first_token_ms, "tpot_ms": record.tpot_ms}
    figures |= {key: value for key, value in known.items() if value is not None}
    if record.speculation is not None:
        figures |= speculation_figures(record.speculation.stats)
    return figures


def speculation_figures(stats: SpeculationStats) -> dict[str, float]:
    """Those of acceptance; none where no step was made."""
    if not stats.steps:
        return {}
    return {
        "acceptance_rate": stats.acceptance_rate,
        "mean_accepted_length": stats.mean_accepted_length,
    }


def _time_figures(latency_ms: float, num_tokens: int) -> dict[str, float]:
    figures = {
        "latency_ms": latency_ms,
        "num_tokens": num_tokens,
        "tokens_per_second": tokens_per_second(num_tokens, latency_ms),
    }
    return {**figures, "ms_per_token": latency_ms / num_tokens} if num_tokens else figures


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

    def by_prompt(self, groups: Sequence[Sequence[int]]) -> Measurements:
        """The runs of batches as runs of their prompts, each with its own result or error.

        Args:
            groups: the prompts of each batch.
        """
        runs = []
        for run in self.runs:
            results = (run.result or {}).get("results", [run.result])
            for place, index in enumerate(groups[run.prompt_index]):
                error = run.errors.get(place, run.error)
                result = None if error is not None else results[place]
                runs.append(replace(run, prompt_index=index, result=result, error=error))
        return Measurements(runs)


def measure(
    runners: Mapping[str, Runner],
    prompts: Sequence[Any],
    *,
    iterations: int,
    warmup: int,
    names: Sequence[Sequence[str]] | None = None,
    on_run: Callable[[int], None] | None = None,
    keep: Callable[[Run], None] | None = None,
) -> Measurements:
    """Runs every mode on every prompt, ``iterations`` times.

    Modes take turns prompt by prompt (A B C, B C A, C A B, ...), and on each prompt from iteration
    to iteration: a machine that slows down slows all of them, and none always goes first. Warm-up
    runs go over the first prompts and are not kept. A run that fails, whatever the reason, is kept
    as a failure and the others go on; a runner that is gone (`RunnerGone`) is asked no more. Ctrl-C
    ends the loop with what there is; the run that it hit is not kept.

    Args:
        prompts: what the runners take: texts, or batches of them.
        names: how messages call the prompts: for a text one name, for a batch one for each of its
            texts. Without them it is "prompt 0" and so on.
        on_run: called with 1 after each run, warm-up included, and for each that is not made as its
            runner is gone.
        keep: called with each run that is kept.
    """
    modes = list(runners)
    names = names or [[f"prompt {index}"] for index in range(len(prompts))]
    kept = Measurements()
    gone: set[str] = set()
    try:
        for number in range(warmup if prompts else 0):
            for mode in modes:
                index = number % len(prompts)
                if mode not in gone:
                    try:
                        _result(runners[mode], prompts[index])
                    except Exception as error:
                        text = _tell(error, names[index], mode, f"warm-up {number}")
                        if isinstance(error, RunnerGone):
                            gone.add(mode)
                            kept.runs.append(Run(mode, index, 0, 0, error=text))
                if on_run is not None:
                    on_run(1)
        for iteration in range(iterations):
            for index, prompt in enumerate(prompts):
                first = (iteration + index) % len(modes)
                for order in range(len(modes)):
                    mode = modes[(first + order) % len(modes)]
                    if mode not in gone:
                        run, is_gone = _run_once(
                            runners[mode], mode, prompt, names[index], index, iteration, order
                        )
                        kept.runs.append(run)
                        if is_gone:
                            gone.add(mode)
                        if keep is not None:
                            keep(run)
                    if on_run is not None:
                        on_run(1)
    except KeyboardInterrupt:
        kept.interrupted = True
    return kept


def _run_once(
    runner: Runner,
    mode: str,
    prompt: Any,
    names: Sequence[str],
    index: int,
    iteration: int,
    order: int,
) -> tuple[Run, bool]:
    """The run, and whether its runner is gone."""
    when = f"iteration {iteration}"
    try:
        result = _result(runner, prompt)
    except Exception as error:
        text = _tell(error, names, mode, when)
        errors = getattr(error, "errors", {})
        run = Run(mode, index, iteration, order, error=text, errors=errors)
        return run, isinstance(error, RunnerGone)
    errors = result.get("errors", {})
    for place, text in errors.items():
        logger.warning("%s, %s, %s: %s", names[place], mode, when, text)
    logger.debug(
        "%s, %s, %s: %d tokens in %.2f ms",
        ", ".join(names), mode, when, result["num_tokens"], result["latency_ms"],
    )  # fmt: skip
    return Run(mode, index, iteration, order, result=result, errors=errors), False


def _result(runner: Runner, prompt: Any) -> dict[str, Any]:
    result = runner.run(prompt)
    if not result["latency_ms"] > 0:
        raise MeasurementError("the clock stood still")
    return result


def _tell(error: Exception, names: Sequence[str], mode: str, when: str) -> str:
    """Logs why a run failed, of a batch for each prompt by its name; returns it."""
    text = describe_error(error)
    whys = getattr(error, "errors", {})
    told = [(names[place], why) for place, why in whys.items()] or [(", ".join(names), text)]
    for name, why in told:
        logger.warning("%s, %s, %s: %s", name, mode, when, why)
    logger.debug("the traceback", exc_info=error)
    return text
