"""Asks models what to draft with: short recorded runs of every draft mode, in turns with plain
decoding, then `inferlab.benchmarks.advice`; and really runs what was advised."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from inferlab.benchmarks.advice import Forecast, Setting, Weigher
from inferlab.benchmarks.batches import batches_to_time, full_batches, mixed_batches
from inferlab.benchmarks.environment import describe_environment
from inferlab.benchmarks.measure import measure
from inferlab.benchmarks.names import PLAIN
from inferlab.benchmarks.runners import BatchRunner, plain_pipeline
from inferlab.benchmarks.statistics import bootstrap_interval
from inferlab.config import SpecdecConfig, choices
from inferlab.draft_modes import DRAFT_MODES
from inferlab.errors import UsageError, describe_error
from inferlab.models import format_of
from inferlab.records import record_of
from inferlab.specdec.costs import CostModel
from inferlab.specdec.cuts import Rule
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.specdec.recorded import read_recording
from inferlab.specdec.replay import Replay
from inferlab.specdec.replay_times import Scale

logger = logging.getLogger(__name__)

MODES = tuple(mode for mode in choices(SpecdecConfig, "draft_mode") if mode != "none")
BATCHES = (1, 4, 16)
CURVE = (1, 2, 4, 8, 16)
"""Batch sizes of break-even curves, beside those that were asked for."""
SHORTLIST = 2
"""Modes whose best settings are recorded by themselves at a time, for each batch size."""
MOST_NODES = 32
"""Of a tree that is weighed."""
WARM_UP_TOKENS = 8
UNSURE = 0.25
"""Error of a cost model from which on it is said that it says little."""


@dataclass(frozen=True)
class Advice:
    """What to draft with.

    Attributes:
        environment: of the machine and its libraries.
        settings: of the run.
        best: batch size -> what is expected of the best setting of each mode, fastest first. The
            first says what to do: draft so where it ``pays``, else decode plainly.
        curve: mode -> the same at batch sizes by doublings, from the first recording alone.
        left_out: mode -> why.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    best: dict[int, list[Forecast]]
    curve: dict[str, list[Forecast]]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Verified:
    """A forecast and what came of it.

    Attributes:
        speedup: measured: medians of each batch of prompts, drafted and plainly in turns, summed.
        interval: of it, 95 %, bootstrapped over the batches of prompts; None of a single one.
        off: predicted / measured - 1.
    """

    forecast: Forecast
    speedup: float
    interval: tuple[float, float] | None
    off: float


class Advisor:
    """Weighs draft modes on one target.

    Args:
        config: of the models, the sampling, the policy; ``max_k`` bounds the levels that are
            weighed. What it says of how much to draft is ignored.
        modes: draft modes, all of which must work. None: those that there are weights for.
        batch_sizes: prompts decoded together.

    Raises:
        UsageError: a policy that cannot be replayed, a batch size below 1 or above ``max_batch``,
            an unknown mode.
        ValueError: models that cannot be loaded or do not fit together.
    """

    def __init__(
        self,
        config: SpecdecConfig,
        modes: Sequence[str] | None = None,
        batch_sizes: Sequence[int] = BATCHES,
    ) -> None:
        Rule(config.policy).check()
        for mode in modes or ():
            if mode not in MODES:
                raise UsageError(
                    f"--draft-mode: {mode!r} is unknown; known are {', '.join(MODES)}; plain "
                    "decoding is always weighed against them"
                )
        for size in batch_sizes:
            if not 1 <= size <= config.max_batch:
                raise UsageError(
                    f"--batch: {size} is not allowed; must be from 1 to max_batch "
                    f"({config.max_batch}), which --config can raise"
                )
        self.config = config
        self.batch_sizes = tuple(dict.fromkeys(batch_sizes))
        plain = {"draft_mode": "none", "tree": None, "policy": "longest_prefix", "record": None}
        self._plain = SpeculativePipeline(config=config.model_copy(update=plain))
        self.target = self._plain.target
        costs = self._plain.costs()
        if costs is None:
            raise UsageError(
                f"the context of {self.target.name} or its K/V cache has no room for the texts "
                "that costs are measured on; take a model with a longer one, or raise num_pages "
                "or kv_memory_mb"
            )
        self._plain_costs = costs.step
        self.left_out: dict[str, str] = {}
        self.modes: list[str] = []
        for mode in modes or MODES:
            why = _missing(config, mode) if modes is None else None
            if why is None:
                try:
                    self._pipeline(self._most(mode))
                except (ValueError, OSError) as error:
                    if modes is not None:
                        raise
                    why = describe_error(error)
            if why is None:
                self.modes.append(mode)
            else:
                self.left_out[mode] = why

    def num_groups(self, num_prompts: int) -> int:
        """How many batches `run` decodes at most, each plainly and in the ways that are weighed."""
        again = sum(len(batches_to_time(range(num_prompts), size)) for size in self.batch_sizes)
        return len(mixed_batches(range(num_prompts), self.batch_sizes)) + again * -(
            -len(self.modes) // SHORTLIST
        )

    def run(self, prompts: Sequence[str], on_group: Callable[[int], None] | None = None) -> Advice:
        """Records, and says what is best.

        All modes first draft as much as they can, on batches of all sizes; cut to less, that says
        what every setting gives, roughly. Then the best settings of the fastest modes are recorded
        by themselves, on batches of the size that they are best for, until none that was not
        promises more.

        Args:
            on_group: called with 1 after each batch of prompts.

        Raises:
            ValueError: no prompts, or one that cannot be decoded.
        """
        if not prompts:
            raise ValueError("prompts is empty; give at least one")
        for prompt in prompts:
            self.check(prompt)
        report = on_group or (lambda _: None)
        most = {mode: self._most(mode) for mode in self.modes}
        recorded = self._record(most, mixed_batches(prompts, self.batch_sizes), report)
        weighers = {mode: Weigher(mode, *replays) for mode, replays in recorded.items()}
        for mode, weigher in weighers.items():
            if weigher.error > UNSURE:
                logger.warning(
                    "%s: the cost model is off by %.0f %% in the median: it was measured on a busy "
                    "machine; have it measured anew when that is idle: --no-cost-cache",
                    mode, weigher.error * 100,
                )  # fmt: skip
        found = {
            size: [fastest for w in weighers.values() if (fastest := w.best(size)) is not None]
            for size in sorted({*CURVE, *self.batch_sizes})
        }
        best: dict[int, list[Forecast]] = {}
        for size in self.batch_sizes:
            rough = sorted(found[size], key=_speedup, reverse=True)
            nearer: list[Forecast] = []
            while rough and (not nearer or _speedup(rough[0]) > max(map(_speedup, nearer))):
                nearer += self._weigh_again(rough[:SHORTLIST], prompts, report)
                del rough[:SHORTLIST]
            best[size] = [*sorted(nearer, key=_speedup, reverse=True), *rough]
        curve = {
            mode: [f for size in found for f in found[size] if f.setting.mode == mode]
            for mode in weighers
        }
        return Advice(
            describe_environment(), self._settings(len(prompts)), best, curve, dict(self.left_out)
        )

    def _weigh_again(
        self, rough: Sequence[Forecast], prompts: Sequence[str], report: Callable[[int], None]
    ) -> list[Forecast]:
        """The settings of these forecasts, of one batch size, recorded as they would run."""
        if not rough:
            return []
        size = rough[0].batch
        settings = {str(forecast.setting): forecast.setting for forecast in rough}
        changes = {name: setting.changes for name, setting in settings.items()}
        recorded = self._record(changes, batches_to_time(prompts, size), report)
        again = [
            Weigher(settings[name].mode, *replays, [settings[name]]).best(size, rough=False)
            for name, replays in recorded.items()
        ]
        return [forecast for forecast in again if forecast is not None]

    def verify(
        self,
        advice: Advice,
        prompts: Sequence[str],
        on_run: Callable[[int], None] | None = None,
    ) -> dict[int, Verified]:
        """Runs the best setting of each batch size and plain decoding in turns,
        ``config.iterations`` times over the prompts.

        Args:
            on_run: called with 1 after each run, of which there are `num_runs`.

        Raises:
            RuntimeError: a run failed.
        """
        verified = {}
        for size, forecasts in advice.best.items():
            if not forecasts:
                continue
            groups = full_batches(prompts, size)
            drafting = self._pipeline(forecasts[0].setting.changes)
            measured = measure(
                {"drafted": BatchRunner(drafting), PLAIN: BatchRunner(plain_pipeline(drafting))},
                groups,
                iterations=self.config.iterations,
                warmup=self.config.warmup_iterations,
                names=[[f"batch {index}"] * size for index in range(len(groups))],
                on_run=on_run,
            )
            if measured.interrupted:
                raise KeyboardInterrupt
            if failed := measured.failures():
                raise RuntimeError(f"batch {failed[0].prompt_index}: {failed[0].error}")
            ms = {
                mode: np.array(
                    [
                        median(run.row()["ms_per_token"] for run in measured.of(mode, index))
                        for index in range(len(groups))
                    ]
                )
                for mode in ("drafted", PLAIN)
            }
            verified[size] = _compare(forecasts[0], ms[PLAIN], ms["drafted"])
        return verified

    def num_runs(self, advice: Advice, num_prompts: int) -> int:
        """How many runs `verify` makes."""
        rounds, warmup = self.config.iterations, self.config.warmup_iterations
        sizes = [size for size, forecasts in advice.best.items() if forecasts]
        return sum(2 * (-(-num_prompts // size) * rounds + warmup) for size in sizes)

    def _most(self, mode: str) -> dict[str, Any]:
        """What makes a mode draft as much as is weighed: chains of ``max_k`` levels, its usual
        tree."""
        usual = DRAFT_MODES[mode]
        if usual.tree == "chain":
            return Setting(mode, self.config.max_k).changes
        nodes = min(usual.nodes, MOST_NODES)
        return Setting(mode, min(usual.levels, self.config.max_k), nodes).changes

    def _pipeline(
        self, changes: Mapping[str, Any], record: Path | None = None
    ) -> SpeculativePipeline:
        update = {**changes, "record": None if record is None else str(record)}
        return SpeculativePipeline(config=self.config.model_copy(update=update), target=self.target)

    def _record(
        self,
        ways: Mapping[str, Mapping[str, Any]],
        groups: Sequence[Sequence[str]],
        report: Callable[[int], None],
    ) -> dict[str, tuple[Replay, Replay]]:
        """Decodes batches of prompts in every way and plainly, in turns.

        Returns:
            Of each way the replay, and one of plain decoding on the same texts: its steps have no
            drafts, and take what the runs without took. (Those are not recorded, which would slow
            them down.)
        """
        with tempfile.TemporaryDirectory(prefix="inferlab-advise-") as folder:
            folders = {name: Path(folder) / str(number) for number, name in enumerate(ways)}
            pipelines = {name: self._pipeline(ways[name], folders[name]) for name in ways}
            for pipeline in (self._plain, *pipelines.values()):
                recorder, pipeline.engine.recorder = pipeline.engine.recorder, None
                pipeline.generate(list(groups[0]), max_tokens=WARM_UP_TOKENS)
                pipeline.engine.recorder = recorder
            plain = BatchRunner(self._plain)
            steps, reading = [], []
            for group in groups:
                for pipeline in pipelines.values():
                    pipeline.generate(list(group))
                ran = plain.run(group)
                steps.append(self._plain_steps(ran))
                reading.append(self._plain_reading(ran))
                report(1)
            costs = CostModel(self._plain_costs)
            found = {}
            for name in ways:
                recording = read_recording(folders[name])
                without = Replay(recording, costs)
                without.times.step_scale = _scale(steps)
                without.times.reading_scale = _scale(reading)
                found[name] = (Replay(recording), without)
            return found

    def _plain_steps(self, ran: Mapping[str, Any]) -> tuple[int, float, float]:
        """Of a batch decoded plainly: its size, and the ms of its steps behind the prompts, as the
        cost model predicts them and as they were."""
        records = [record_of(result) for result in ran["results"]]
        sizes = [(record.prompt_tokens or 0, record.num_tokens) for record in records]
        predicted = 0.0
        for step in range(1, max(tokens for _, tokens in sizes)):
            left = [prompt + step for prompt, tokens in sizes if tokens > step]
            predicted += self._plain_costs.ms(len(left), 1, sum(left) / len(left))
        return len(sizes), predicted, ran["latency_ms"] - ran["timings_ms"]["prefill"]

    def _plain_reading(self, ran: Mapping[str, Any]) -> tuple[int, float, float]:
        """The same of the step that reads its prompts."""
        results = ran["results"]
        tokens = sum(record_of(result).prompt_tokens or 0 for result in results) / len(results)
        predicted = self._plain_costs.ms(len(results), tokens, tokens / 2)
        return len(results), predicted, ran["timings_ms"]["prefill"]

    def check(self, prompt: str) -> None:
        """Raises ValueError for a prompt that cannot be decoded."""
        self._plain.check(prompt)

    def _settings(self, num_prompts: int) -> dict[str, Any]:
        c = self.config
        return {
            "base_model": self.target.name,
            "device": str(self.target.device),
            "dtype": format_of(self.target),
            "prompts": num_prompts,
            "max_new_tokens": c.max_new_tokens,
            "temperature": c.effective_temperature,
            "seed": c.seed,
            "policy": c.policy,
        }


def _scale(times: Sequence[tuple[int, float, float]]) -> Scale:
    """From batch sizes, predicted and real ms."""
    batch, predicted, real = np.array(times).T
    return Scale.of(batch, predicted, real, least=1)


def _speedup(forecast: Forecast) -> float:
    return forecast.speedup


def _compare(forecast: Forecast, plain_ms: np.ndarray, drafted_ms: np.ndarray) -> Verified:
    """``plain_ms``, ``drafted_ms``: [G] per token, of each batch of prompts."""

    def ratio(places: np.ndarray) -> np.ndarray:
        at = places.astype(np.int64)
        return np.asarray(plain_ms[at].sum(axis=-1) / drafted_ms[at].sum(axis=-1))

    places = np.arange(len(plain_ms))
    speedup = float(ratio(places))
    interval = bootstrap_interval(places, ratio, method="percentile")
    return Verified(forecast, speedup, interval, forecast.speedup / speedup - 1)


def _missing(config: SpecdecConfig, mode: str) -> str | None:
    """Why a mode that was not asked for is not even tried."""
    if mode.endswith("-lite"):
        return "its heads are untrained; name it in --draft-mode to see what it does"
    if config.implementation == "fake" or config.base_model == SpecdecConfig().base_model:
        return None
    weights = {
        "vanilla": ("a draft model", "--draft-model", "draft_model" in config.model_fields_set),
        "medusa": ("Medusa heads", "--heads", "model" in config.medusa.model_fields_set),
        "eagle": ("an EAGLE head", "--heads", "model" in config.eagle.model_fields_set),
    }
    needed = config.ensemble.drafters if mode == "ensemble" else (mode,)
    for name in needed:
        if name in weights and not weights[name][2]:
            what, flag, _ = weights[name]
            where = flag if flag == "--draft-model" else f"--draft-mode {name} {flag}"
            return f"there is no word of {what} for {config.base_model}; name them with {where}"
    return None
