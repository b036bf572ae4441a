"""Other engines side by side with ours: `inferlab bench --peers`.

Plain and speculative decoding and every peer that is installed, each in a process of its own, take
turns on each prompt: the same model, token ids, lengths and sampling for all.
"""

from __future__ import annotations

import functools
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

from inferlab.benchmarks.batches import groups_of
from inferlab.benchmarks.comparison import figures_of, speedup
from inferlab.benchmarks.energy import EnergyMeter
from inferlab.benchmarks.environment import describe_environment
from inferlab.benchmarks.measure import (
    MeasurementError,
    Measurements,
    Run,
    Runner,
    RunnerGone,
    measure,
)
from inferlab.benchmarks.names import PEER_TIMEOUT_S, PLAIN, SPECULATIVE
from inferlab.benchmarks.outputs import PeerFigures, PeersSettings, PeersStats, TokenIds
from inferlab.benchmarks.peers import PEERS, PeerFacts
from inferlab.benchmarks.peers.engines import Engines
from inferlab.benchmarks.peers.process import PeerFailed, PeerGone
from inferlab.benchmarks.token_ids import compare_runs, explain_difference, why_not_exact
from inferlab.config import MOST_BATCH, SpecdecConfig
from inferlab.models import HFModel

logger = logging.getLogger(__name__)

SETTLE_S = 0.3
"""Before a run: threads of the process before may wait for work on their cores, most for 0.2 s."""

_OFF = {
    "implementation": "hf", "quantization": "none", "draft_quantization": "none",
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "min_new_tokens": 0, "stop": (), "record": None,
}  # fmt: skip
"""Settings that not all peers have, and their values without effect."""


class SideBySide:
    """Measures peers against plain and speculative decoding.

    Args:
        config: of the target, the draft, the sampling and the controller. Checkpoints' own rules
            for tokens (``generation_config.json``) are followed by nobody: not all peers can.
        peers: names in ``table``.
        batch_sizes: prompts decoded together.
        pythons, folder, timeout_s: see `Engines`.
        settle_s: waited before each run.
        table: the peers that there are.

    Raises:
        ValueError: a peer that is not known, a batch size below 1, a setting that not all peers
            have, named.
    """

    def __init__(
        self,
        config: SpecdecConfig,
        peers: Sequence[str],
        batch_sizes: Sequence[int] = (1,),
        *,
        pythons: Mapping[str | None, str] | None = None,
        folder: Path | None = None,
        timeout_s: float = PEER_TIMEOUT_S,
        settle_s: float = SETTLE_S,
        table: Mapping[str, PeerFacts] = PEERS,
    ) -> None:
        for name in peers:
            if name not in table:
                raise ValueError(f"peers has {name!r}; known are {', '.join(table)}")
        for size in batch_sizes:
            if not 1 <= size <= MOST_BATCH:
                raise ValueError(
                    f"batch_sizes has {size}; each must be at least 1 and at most {MOST_BATCH}"
                )
        for key, value in _OFF.items():
            if getattr(config, key) != value:
                raise ValueError(
                    f"{key} is {getattr(config, key)!r}; not all peers have that: leave it out"
                )
        room = max(config.max_batch, *batch_sizes)
        self.config = config.model_copy(
            update={"ignore_generation_config": True, "max_batch": room}
        )
        self.peers = {name: table[name] for name in peers}
        self.batch_sizes = tuple(dict.fromkeys(batch_sizes))
        self._settle_s = settle_s
        self._engines = functools.partial(
            Engines, self.peers, pythons=pythons or {}, folder=folder, timeout_s=timeout_s
        )

    def num_runs(self, num_prompts: int) -> int:
        """How many runs `run` makes if all peers are there, warm-up included."""
        warmup = self.config.warmup_iterations if num_prompts else 0
        return sum(
            (len(groups_of(range(num_prompts), size)) * self.config.iterations + warmup)
            * (2 + sum(facts.batches or size == 1 for facts in self.peers.values()))
            for size in self.batch_sizes
        )

    def run(
        self,
        prompts: Sequence[str],
        on_run: Callable[[int], None] | None = None,
        *,
        names: Sequence[str] | None = None,
        keep: Callable[[dict[str, Any]], None] | None = None,
    ) -> PeersStats:
        """Measures ``config.iterations`` rounds over the prompts, per batch size.

        A peer that is missing, cannot load the model, crashes or does not answer is told of in
        ``left_out``, and the others go on. So do other prompts than those that our engine refuses.

        Args:
            on_run: called with the number of runs made since it was called last.
            names: how messages call the prompts, such as ``FILE:LINE``.
            keep: called with the row of each run as soon as it is made.

        Raises:
            RuntimeError: our own engine cannot be started.
        """
        names = names or [f"prompt {index}" for index in range(len(prompts))]
        with (
            tempfile.TemporaryDirectory(prefix="inferlab-peers-") as work,
            closing(self._engines(Path(work))) as engines,
        ):
            engines.start_ours(self.config)
            encoded = engines.call(PLAIN, "encode", texts=list(prompts))
            refused = {i: found["error"] for i, found in enumerate(encoded) if "error" in found}
            for index, error in refused.items():
                logger.warning("%s is left out: %s", names[index], error)
            ids = {i: found["ids"] for i, found in enumerate(encoded) if i not in refused}
            # One more: some engines refuse a text that would just fill their context.
            context = max(map(len, ids.values()), default=0) + self.config.max_new_tokens + 1
            engines.start_peers(self.config, context=context, batch=max(self.batch_sizes))
            measuring = _Measuring(self, engines, prompts, names, ids, keep)
            for size in self.batch_sizes:
                measuring.measure(size, on_run, refused)
                if measuring.interrupted:
                    break
            if on_run is not None and not measuring.interrupted:
                on_run(self.num_runs(len(prompts)) - measuring.made)  # what was left out
            engines.note_memory()
        environment: Any = describe_environment()
        return {
            "environment": environment,
            "settings": self._settings(engines, measuring.meter, len(prompts)),
            "prompts": list(prompts),
            "engines": engines.loaded,
            "left_out": engines.left_out,
            "batches": measuring.batches,
            "token_ids": measuring.token_ids,
            "runs": measuring.rows,
            "failures": measuring.failures,
            "interrupted": measuring.interrupted,
        }

    def _settings(self, engines: Engines, meter: EnergyMeter, num_prompts: int) -> PeersSettings:
        config = self.config
        return {
            "base_model": config.base_model,
            "draft_model": config.draft_model if config.draft_mode == "vanilla" else None,
            "draft_mode": config.draft_mode,
            "device": engines.about["device"],
            "dtype": engines.about["dtype"],
            "threads": engines.threads,
            "prompts": num_prompts,
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.effective_temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "min_p": config.min_p,
            "seed": config.seed,
            "controller": config.controller_name,
            "iterations": config.iterations,
            "energy_sources": list(meter.sources),
        }


class _Measuring:
    """A run of `SideBySide`: what was measured so far."""

    def __init__(
        self,
        of: SideBySide,
        engines: Engines,
        prompts: Sequence[str],
        names: Sequence[str],
        ids: Mapping[int, list[int]],
        keep: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._of, self._engines = of, engines
        self._prompts, self._names, self._ids = prompts, names, ids
        self._keep = keep
        self.meter = EnergyMeter(engines.about["gpu"])
        self.batches: dict[str, dict[str, PeerFigures]] = {}
        self.token_ids: dict[str, dict[str, TokenIds]] = {}
        self.rows: list[Any] = []
        self.failures: list[Any] = []
        self.interrupted = False
        self.made = 0
        """Runs that ``on_run`` was told of."""

    def measure(
        self, size: int, on_run: Callable[[int], None] | None, refused: Mapping[int, str]
    ) -> None:
        """All rounds with batches of ``size``."""
        config = self._of.config
        groups = groups_of(list(self._ids), size)
        runners: dict[str, Runner] = {
            name: PeerRunner(self._engines, name, config, self.meter, self._of._settle_s)
            for name in self._at(size)
        }

        def row(run: Run) -> dict[str, Any]:
            flat = {"batch_size": size, **run.row(), "prompt_indices": [*groups[run.prompt_index]]}
            return {key: value for key, value in flat.items() if key != "prompt_index"}

        def kept(run: Run) -> None:
            if self._keep is not None:
                self._keep({**row(run), "result": run.result})

        def told(count: int) -> None:
            self.made += count
            if on_run is not None:
                on_run(count)

        measured = measure(
            runners,
            [[self._ids[index] for index in group] for group in groups],
            iterations=config.iterations,
            warmup=config.warmup_iterations,
            names=[[self._names[index] for index in group] for group in groups],
            on_run=told,
            keep=kept,
        )
        single = measured.by_prompt(groups)
        failed = [Run(PLAIN, index, 0, 0, error=why) for index, why in refused.items()]
        self.failures += [
            {"batch_size": size, **run.row()} for run in [*failed, *single.failures()]
        ]
        self.rows += [row(run) for run in measured.runs]
        self.token_ids[str(size)] = self._compare(single)
        self.batches[str(size)] = {
            name: _figures(measured, name, len(groups)) for name in runners if measured.of(name)
        }
        self.interrupted = measured.interrupted

    def _at(self, size: int) -> list[str]:
        """Engines that can decode batches of ``size``."""
        engines = self._engines
        return [
            name
            for name in engines.loaded
            if name not in engines.left_out and (engines.facts[name].batches or size == 1)
        ]

    def _compare(self, single: Measurements) -> dict[str, TokenIds]:
        """Each engine's ids with plain decoding's, where decoding is greedy; ours always."""
        config, about = self._of.config, self._engines.about
        sampled = None
        if config.effective_temperature > 0:
            sampled = "it samples from a noise of its own"

        @functools.cache
        def target() -> HFModel:
            """Loaded when there is a difference to judge."""
            return HFModel.load(
                config.base_model,
                device=about["device"],
                dtype=about["dtype"],
                trust_remote_code=config.trust_remote_code,
                allow_pickle=config.allow_pickle,
            )

        def explain(index: int, one: Sequence[int], other: Sequence[int]) -> Mapping[str, Any]:
            return explain_difference(target(), config, self._prompts[index], one, other)

        found: dict[str, Any] = {}
        for name in dict.fromkeys(run.mode for run in single.runs):
            if name == PLAIN:
                continue
            both = Measurements([run for run in single.runs if run.mode in (PLAIN, name)])
            why = why_not_exact(config) if name == SPECULATIVE else sampled
            not_compared = {} if why is None else {name: why}
            found[name] = compare_runs(both, len(self._prompts), not_compared, explain)
        return found


class PeerRunner:
    """An engine's process in the measuring loop.

    Args:
        settle_s: waited before each run.
    """

    def __init__(
        self,
        engines: Engines,
        name: str,
        config: SpecdecConfig,
        meter: EnergyMeter,
        settle_s: float,
    ) -> None:
        self.name = name
        self._engines = engines
        self._meter = meter
        self._settle_s = settle_s
        self._max_new_tokens = config.max_new_tokens
        self._sampling = {
            "temperature": config.effective_temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "min_p": config.min_p,
            "seed": config.seed,
            "stop_ids": engines.about["stop_ids"],
        }

    def run(self, prompt: Any) -> dict[str, Any]:
        """As `measure.Runner.run`, of lists of token ids; ``results`` has the ``token_ids`` of
        each.

        Raises:
            RunnerGone: the process is gone.
            MeasurementError: it failed this time.
        """
        time.sleep(self._settle_s)
        before = self._meter.read()
        try:
            found = self._engines.call(
                self.name,
                "generate",
                prompts=prompt,
                max_new_tokens=self._max_new_tokens,
                sampling=self._sampling,
            )
        except PeerFailed as error:
            raise MeasurementError(str(error)) from error
        except PeerGone as error:
            raise RunnerGone(str(error)) from error
        return {
            "latency_ms": found["ms"],
            "num_tokens": sum(map(len, found["ids"])),
            "first_token_ms": found["first_ms"],
            "energy_j": self._meter.since(before),
            "accepted_length": found.get("accepted_length"),
            "results": [{"token_ids": ids} for ids in found["ids"]],
        }

    def describe(self) -> dict[str, Any]:
        return {**self._engines.loaded[self.name]}


def _figures(measured: Measurements, name: str, num_groups: int) -> PeerFigures:
    summaries = figures_of(measured, name)
    results = [run.result for run in measured.of(name) if run.result is not None]
    lengths = [one["accepted_length"] for one in results if one["accepted_length"] is not None]
    joules = [
        one["energy_j"] / one["num_tokens"]
        for one in results
        if one["energy_j"] is not None and one["num_tokens"]
    ]
    figures: Any = {
        key: summaries[key]
        for key in ("tokens_per_second", "ms_per_token", "first_token_ms")
        if key in summaries
    }
    figures["joules_per_token"] = median(joules) if joules else None
    figures["accepted_length"] = median(lengths) if lengths else None
    for ours in (PLAIN, SPECULATIVE):
        ratio = speedup(measured, ours, name, num_groups) if name != ours else None
        figures[f"{ours}_is_x"] = ratio
    found: PeerFigures = figures
    return found
