"""BenchmarkRunner: local, HTTP and speculative decoding, measured; speculation also compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from inferlab.baseline import LocalBaselineRunner
from inferlab.benchmarks.comparison import by_prompt, compare_modes, figures_of, phases_of
from inferlab.benchmarks.environment import describe_environment
from inferlab.benchmarks.measure import Measurements, Runner, measure
from inferlab.benchmarks.names import HTTP_SEED, MODES, Config, load_mode_config
from inferlab.benchmarks.perplexity import add_perplexity
from inferlab.benchmarks.run_report import run_report
from inferlab.benchmarks.runners import (
    GenerateRunner,
    HTTPRunner,
    LocalRunner,
    SpecdecRunner,
    plain_pipeline,
)
from inferlab.benchmarks.token_ids import compare_token_ids
from inferlab.client.ping import VLLMPingClient
from inferlab.config import BaselineConfig, SpecdecConfig, VllmConfig
from inferlab.reports.terminal import print_report
from inferlab.specdec.pipeline import SpeculativePipeline


class BenchmarkInterrupted(KeyboardInterrupt):
    """Ctrl-C during a benchmark; ``stats`` holds what was measured until then."""

    def __init__(self, stats: dict[str, Any]) -> None:
        super().__init__("benchmark interrupted")
        self.stats = stats


class BenchmarkRunner:
    """Measures one way to decode, and compares speculation with what it must beat.

    Usable as a context manager, which closes the connections of http mode.

    Args:
        config_path: YAML of the mode's kind: ``baseline`` (local), ``vllm`` (http), ``specdec``.
        mode: "local" (Hugging Face ``generate``), "http" (an OpenAI-compatible server) or
            "specdec" (the engine).
        host, port: of the server, in http mode.
        compare_baseline: in specdec mode, run plain decoding in the same engine and Hugging Face
            ``generate`` on the same weights in turn with it, and compare times and token ids.
        eval_perplexity: judge the generated tokens by the target model (real models only).
        stream: in http mode, stream the answers and measure TTFT and TPOT.
        config: a configuration made elsewhere, in place of file and overrides.
        overrides: any key of the mode's configuration (``iterations``, ``warmup_iterations``,
            ``seed``, ``base_model``, ``base_url``, ...).

    Raises:
        ValueError: an unknown mode, or what this mode cannot do.
        ConfigError: an unknown key or a value that is not allowed.
    """

    def __init__(
        self,
        config_path: str | None = None,
        mode: str = "local",
        host: str | None = None,
        port: int | None = None,
        compare_baseline: bool = False,
        eval_perplexity: bool = False,
        *,
        stream: bool = False,
        config: Config | None = None,
        **overrides: Any,
    ) -> None:
        server = host is not None or port is not None
        _check_mode(mode, compare_baseline, eval_perplexity, stream, server)
        self.mode = mode
        self.eval_perplexity = eval_perplexity
        self._client: VLLMPingClient | None = None
        self._model: Any = None  # who judges perplexity: the target, or the local baseline
        if config is None:
            if server:
                overrides = {**overrides, "host": host, "port": port}
            config = load_mode_config(mode, config_path, overrides)
        self.config = config
        self.runners: dict[str, Runner]
        if isinstance(config, BaselineConfig):
            baseline = LocalBaselineRunner(config=config)
            self._model = baseline
            self.runners = {mode: LocalRunner(baseline)}
        elif isinstance(config, VllmConfig):
            seed = config.seed if config.seed is not None else HTTP_SEED
            self._client = VLLMPingClient(config=config)
            self.runners = {mode: HTTPRunner(self._client, seed=seed, stream=stream)}
        else:
            if eval_perplexity and config.implementation == "fake":
                raise ValueError(
                    "eval_perplexity needs a real model; the probabilities of fake ones mean "
                    "nothing: use implementation (--impl) hf"
                )
            self.runners = self._specdec_runners(config, compare_baseline)
        self.main_mode = next(iter(self.runners))
        self.runner = self.runners[self.main_mode]

    def _specdec_runners(self, config: SpecdecConfig, compare: bool) -> dict[str, Runner]:
        pipeline = SpeculativePipeline(config=config)
        self._model = pipeline.target
        drafts = config.draft_mode != "none"
        runners: dict[str, Runner] = {"specdec" if drafts else "plain": SpecdecRunner(pipeline)}
        if compare and drafts:
            runners["plain"] = SpecdecRunner(plain_pipeline(pipeline))
        if compare and pipeline.target.plain() is not None:
            runners["hf"] = GenerateRunner(pipeline.target, config)
        return runners

    def __enter__(self) -> BenchmarkRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections to the server, in http mode; the runner is done then."""
        if self._client is not None:
            self._client.close()

    def num_runs(self, num_prompts: int, iterations: int | None = None) -> int:
        """How many runs :meth:`run_benchmark` makes, warm-up included."""
        rounds = (iterations or self.config.iterations) * num_prompts
        return (rounds + self.config.warmup_iterations) * len(self.runners)

    def run_benchmark(
        self,
        prompt: str | Sequence[str],
        iterations: int | None = None,
        *,
        on_run: Callable[[int], None] | None = None,
    ) -> dict[str, Any]:
        """Measures.

        Args:
            prompt: one, or several; each is run ``iterations`` times.
            iterations: instead of the configuration's, at least 1.
            on_run: called with 1 after each run.

        Returns:
            A mapping of JSON types:

            * ``mode``, ``runner_name``, ``iterations``, ``warmup_iterations``, ``prompt`` (the
              first), ``prompts``, ``num_prompts``, ``environment``, and the runner's description
              (``device``, ``model`` or ``base_model``, ``draft_model``, ``max_draft``,
              ``draft_mode``, ``server``, ``seed``, ...);
            * ``latency_ms``, ``tokens_per_second``, ``ms_per_token``, ``num_tokens`` and, where
              measured, ``acceptance_rate``, ``mean_accepted_length``, ``target_forwards``,
              ``first_token_ms``, ``ttft_ms``, ``tpot_ms``: each with ``mean``, ``median``, ``std``,
              ``min``, ``max``, ``p90``, ``p99``, ``mean_ci95``, ``median_ci95`` and ``raw``;
            * ``phases_ms_per_token`` in specdec mode: draft, verify, accept, commit, ...;
            * ``by_prompt``: medians of each prompt; ``runs``: a flat row per run of any mode;
              ``raw_results``: the runner's own results;
            * ``failures``: runs that failed and why; ``interrupted``;
            * ``baseline_comparison`` where asked for: see
              :func:`~inferlab.benchmarks.comparison.compare_modes`, with ``token_ids``;
            * ``perplexity`` where asked for;
            * ``error`` in place of the figures where no run succeeded.

        Raises:
            ValueError: no prompts, an empty one, or iterations below 1.
            BenchmarkInterrupted: on Ctrl-C; its ``stats`` are such a mapping.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(prompts):
            raise ValueError("prompt must be a text that is not empty, or a list of such")
        return self.run_all(prompts, iterations, on_run)

    def run_all(
        self,
        prompts: list[str],
        iterations: int | None = None,
        on_run: Callable[[int], None] | None = None,
        *,
        names: Sequence[str] | None = None,
        keep: Callable[[dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """As :meth:`run_benchmark`, but an empty prompt fails alone, like all others that fail.

        Args:
            names: how messages call the prompts, such as ``FILE:LINE``.
            keep: called with each run as soon as it is made: its row, and the runner's ``result``.
        """
        iterations = self.config.iterations if iterations is None else iterations
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; it must be at least 1")
        warmup = self.config.warmup_iterations
        stats: dict[str, Any] = {
            "mode": self.mode,
            "runner_name": self.runner.name,
            "iterations": iterations,
            "warmup_iterations": warmup,
            "prompt": prompts[0],
            "prompts": prompts,
            "num_prompts": len(prompts),
            "environment": describe_environment(),
        }
        if self._client is not None and not self._client.ping():
            error = f"Server not reachable: {self._client.base_url}"
            empty: dict[str, Any] = {"failures": [], "interrupted": False, "runs": []}
            return {**stats, **self.runner.describe(), **empty, "error": error}
        measured = measure(
            self.runners,
            prompts,
            iterations=iterations,
            warmup=warmup,
            names=None if names is None else [[name] for name in names],
            on_run=on_run,
            keep=None if keep is None else lambda run: keep({**run.row(), "result": run.result}),
        )
        stats.update(self.runner.describe())
        stats.update(self._evaluate(measured, prompts))
        if measured.interrupted:
            raise BenchmarkInterrupted(stats)
        return stats

    def print_summary(self, stats: Mapping[str, Any]) -> None:
        """Prints the statistics as tables on stdout."""
        print_report(run_report(stats))

    def _evaluate(self, measured: Measurements, prompts: list[str]) -> dict[str, Any]:
        failures = measured.failures()
        good = measured.of(self.main_mode)
        part: dict[str, Any] = {
            "failures": [run.row() for run in failures],
            "interrupted": measured.interrupted,
        }
        if not good:
            own = measured.failures(self.main_mode)
            part["error"] = (
                f"all {len(own)} runs failed; the first: {own[0].error}"
                if own
                else "interrupted before the first run was done"
            )
        else:
            judged = [run for run in good if (run.result or {})["num_tokens"]]
            if self.eval_perplexity and judged:
                part["perplexity"] = add_perplexity(judged, prompts, self._model)
            part.update(figures_of(measured, self.main_mode))
            if phases := phases_of(measured, self.main_mode):
                part["phases_ms_per_token"] = phases
            part["by_prompt"] = by_prompt(measured, self.main_mode, len(prompts))
            if isinstance(self.config, SpecdecConfig) and len(self.runners) > 1:
                comparison = compare_modes(measured, list(self.runners), len(prompts))
                comparison["token_ids"] = compare_token_ids(
                    measured, prompts, self.config, self._model
                )
                part["baseline_comparison"] = comparison
        part["runs"] = [run.row() for run in measured.runs]
        part["raw_results"] = [
            {"prompt_index": run.prompt_index, "iteration": run.iteration, **(run.result or {})}
            for run in good
        ]
        return part


def _check_mode(mode: str, compare: bool, judge: bool, stream: bool, server: bool) -> None:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
    misplaced = [
        ("compare_baseline", compare and mode != "specdec", "specdec"),
        ("eval_perplexity", judge and mode == "http", "local or specdec"),
        ("stream", stream and mode != "http", "http"),
        ("host and port", server and mode != "http", "http"),
    ]
    for name, wrong, where in misplaced:
        if wrong:
            raise ValueError(f"{name}: not in mode {mode}; use it in mode {where}")
