"""All draft modes side by side on one target: `inferlab bench --modes`.

Plain decoding in the same engine, Hugging Face's ``generate``, its own two speculative ways, and
every draft mode take turns on each prompt, so that a drift of the machine hits all of them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from inferlab.benchmarks.batches import groups_of
from inferlab.benchmarks.comparison import (
    batch_row,
    batch_rows,
    figures_of,
    phases_of,
    speculation_of,
    speedup,
)
from inferlab.benchmarks.environment import describe_environment
from inferlab.benchmarks.measure import Measurements, Run, Runner, measure
from inferlab.benchmarks.names import DRAFT_MODES, GENERATE, PLAIN
from inferlab.benchmarks.peers.hf import LOOKUP_TOKENS
from inferlab.benchmarks.runners import BatchRunner, GenerateRunner, plain_pipeline
from inferlab.benchmarks.token_ids import compare_token_ids
from inferlab.config import SpecdecConfig
from inferlab.draft_modes import tree_misfit
from inferlab.errors import describe_error
from inferlab.models import ShardedModel, format_of
from inferlab.specdec.drafters import CrossVocabularyDrafter
from inferlab.specdec.pipeline import SpeculativePipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModesResult:
    """What was measured, by batch size.

    Attributes:
        environment: of the machine and its libraries.
        settings: of the run.
        batches: batch size -> mode -> figures: ``tokens_per_second`` (median), ``accepted_length``,
            ``acceptance_by_position``, ``target_forwards``, ``phases_ms_per_token``, ``x_plain``
            and ``x_hf`` (``ratio`` and ``ci95``).
        token_ids: batch size -> what comparing the modes' tokens found.
        prompts: what was decoded.
        runs: the raw row of each run, with the records of its requests.
        failures: rows of runs that failed, each of one prompt; of prompts that were left out, too.
        interrupted: Ctrl-C ended it.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    batches: dict[int, dict[str, dict[str, Any]]]
    token_ids: dict[int, dict[str, Any]]
    prompts: list[str]
    runs: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    interrupted: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


class ModesBenchmark:
    """Measures draft modes against plain decoding and Hugging Face.

    Args:
        config: of the target, the sampling and the controller; its ``draft_mode`` is ignored.
        modes: draft modes.
        batch_sizes: prompts decoded together; Hugging Face is measured at 1 only.

    Raises:
        ValueError: an unknown mode, a batch size below 1 or above ``max_batch``.
    """

    def __init__(
        self,
        config: SpecdecConfig,
        modes: Sequence[str] = DRAFT_MODES,
        batch_sizes: Sequence[int] = (1,),
    ) -> None:
        for mode in modes:
            if mode not in DRAFT_MODES:
                raise ValueError(
                    f"modes has {mode!r}; known are {', '.join(DRAFT_MODES)}; plain "
                    "decoding always runs as well"
                )
        for size in batch_sizes:
            if not 1 <= size <= config.max_batch:
                raise ValueError(
                    f"batch_sizes has {size}; each must be between 1 and max_batch "
                    f"({config.max_batch})"
                )
        self.config = config
        self.modes = tuple(modes)
        self.batch_sizes = tuple(batch_sizes)
        first = SpeculativePipeline(config=_with_mode(config, self.modes[0]))
        self.target = first.target
        self._pipelines = {self.modes[0]: first}
        for mode in self.modes[1:]:
            made = SpeculativePipeline(config=_with_mode(config, mode), target=self.target)
            self._pipelines[mode] = made
        self._pipelines[PLAIN] = plain_pipeline(first)

    def num_runs(self, num_prompts: int) -> int:
        """How many runs `run` makes, warm-up included."""
        warmup = self.config.warmup_iterations if num_prompts else 0
        per_mode = sum(
            len(groups_of(range(num_prompts), size)) * self.config.iterations + warmup
            for size in self.batch_sizes
        )
        alone = 1 in self.batch_sizes
        extra = len(self._generators()) * (num_prompts * self.config.iterations + warmup)
        return per_mode * len(self._pipelines) + (extra if alone else 0)

    def run(
        self,
        prompts: Sequence[str],
        on_run: Callable[[int], None] | None = None,
        *,
        names: Sequence[str] | None = None,
        keep: Callable[[dict[str, Any]], None] | None = None,
    ) -> ModesResult:
        """Measures ``config.iterations`` rounds over the prompts, per batch size.

        A prompt that a mode refuses (it is empty, cannot be encoded, is too long) is left out of
        all modes, before batches are formed: modes are compared on the same batches, and no other
        prompt suffers.

        Args:
            on_run: called with the number of runs made since it was called last.
            names: how messages call the prompts, such as ``FILE:LINE``.
            keep: called with each run as soon as it is made: its raw row, and the runner's
                ``result``.
        """
        names = names or [f"prompt {index}" for index in range(len(prompts))]
        refused = self._refusals(prompts, names)
        good = [index for index in range(len(prompts)) if index not in refused]
        if refused and on_run is not None:
            on_run(self.num_runs(len(prompts)) - self.num_runs(len(good)))
        batches: dict[int, dict[str, dict[str, Any]]] = {}
        token_ids: dict[int, dict[str, Any]] = {}
        rows: list[dict[str, Any]] = []
        failures: list[dict[str, Any]] = []
        interrupted = False
        for size in self.batch_sizes:
            runners: dict[str, Runner] = {
                mode: BatchRunner(pipeline) for mode, pipeline in self._pipelines.items()
            }
            if size == 1:
                runners.update(self._generators())
            groups = groups_of(good, size)
            measured = measure(
                runners,
                [_together([prompts[index] for index in group]) for group in groups],
                iterations=self.config.iterations,
                warmup=self.config.warmup_iterations,
                names=[[names[index] for index in group] for group in groups],
                on_run=on_run,
                keep=None if keep is None else functools.partial(_keep, keep, groups, size),
            )
            batches[size] = {
                mode: _figures(measured, mode, len(groups)) for mode in runners if measured.of(mode)
            }
            rows += batch_rows(measured, groups, size)
            single = measured.by_prompt(groups)
            failed = [
                Run(mode, index, 0, 0, error=error)
                for index, errors in refused.items()
                for mode, error in errors.items()
            ] + single.failures()
            failures += [{"batch_size": size, **run.row()} for run in failed]
            token_ids[size] = compare_token_ids(single, list(prompts), self.config, self.target)
            if measured.interrupted:
                interrupted = True
                break
        return ModesResult(
            describe_environment(), self._settings(len(prompts)), batches, token_ids, list(prompts),
            rows, failures, interrupted,
        )  # fmt: skip

    def _refusals(self, prompts: Sequence[str], names: Sequence[str]) -> dict[int, dict[str, str]]:
        """Prompts that a mode refuses: index -> mode -> why."""
        refused: dict[int, dict[str, str]] = {}
        for index, prompt in enumerate(prompts):
            for mode, pipeline in self._pipelines.items():
                try:
                    pipeline.check(prompt)
                except Exception as error:
                    why = describe_error(error)
                    if index not in refused:
                        logger.warning("%s is left out: %s: %s", names[index], mode, why)
                        logger.debug("the traceback", exc_info=error)
                    refused.setdefault(index, {})[mode] = why
        return refused

    def _generators(self) -> dict[str, Runner]:
        """Hugging Face: plain, with the draft model as its assistant, and with prompt lookup.

        Not with a draft model of another vocabulary, which ``generate`` takes in another way, nor
        with one beside a target on several ranks, who have but one of the two.
        """
        if self.target.plain() is None:
            return {}
        runners: dict[str, Runner] = {GENERATE: GenerateRunner(self.target, self.config)}
        can_assist = not isinstance(self.target, ShardedModel)
        if can_assist and "vanilla" in self._pipelines and self.config.effective_temperature == 0:
            vanilla = self._pipelines["vanilla"]
            draft = vanilla.draft_model
            one_vocabulary = not isinstance(vanilla.engine.drafter, CrossVocabularyDrafter)
            if draft is not None and draft.plain() is not None and one_vocabulary:
                runners["hf-assistant"] = GenerateRunner(self.target, self.config, assistant=draft)
        if self.config.effective_temperature == 0:
            runners["hf-lookup"] = GenerateRunner(self.target, self.config, lookup=LOOKUP_TOKENS)
        return runners

    def _settings(self, num_prompts: int) -> dict[str, Any]:
        config = self.config
        return {
            "base_model": self.target.name,
            "device": str(self.target.device),
            "dtype": format_of(self.target),
            "prompts": num_prompts,
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.effective_temperature,
            "seed": config.seed,
            "controller": config.controller,
            "policy": config.policy,
            "iterations": config.iterations,
            "drafters": {m: p.describe_drafter() for m, p in self._pipelines.items() if m != PLAIN},
        }


def _with_mode(config: SpecdecConfig, mode: str) -> SpecdecConfig:
    tree = None if tree_misfit(mode, config.tree) else config.tree
    return config.model_copy(update={"draft_mode": mode, "tree": tree})


def _together(prompts: list[str]) -> str | list[str]:
    """What runners take; alone a prompt stays a text."""
    return prompts[0] if len(prompts) == 1 else prompts


def _keep(
    keep: Callable[[dict[str, Any]], None], groups: Sequence[Sequence[int]], size: int, run: Run
) -> None:
    keep({**batch_row(run, groups, size), "result": run.result})


def _figures(measured: Measurements, mode: str, num_groups: int) -> dict[str, Any]:
    summaries = figures_of(measured, mode)
    figures: dict[str, Any] = {"tokens_per_second": summaries["tokens_per_second"]["median"]}
    if "target_forwards" in summaries:
        figures["target_forwards"] = summaries["target_forwards"]["mean"]
    if (stats := speculation_of(measured, mode)) is not None:
        figures["accepted_length"] = stats.mean_accepted_length
        figures["acceptance_by_position"] = stats.acceptance_by_position
    if phases := phases_of(measured, mode):
        figures["phases_ms_per_token"] = phases
    for key, baseline in (("x_plain", PLAIN), ("x_hf", GENERATE)):
        if mode != baseline and measured.of(baseline):
            figures[key] = speedup(measured, mode, baseline, num_groups)
    return figures
