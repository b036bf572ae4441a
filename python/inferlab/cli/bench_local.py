"""`inferlab bench` of one mode, of all draft modes, and of formats of weights."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from inferlab.benchmarks.benchmark import BenchmarkInterrupted, BenchmarkRunner
from inferlab.benchmarks.modes import ModesBenchmark
from inferlab.benchmarks.names import DRAFT_MODES, Config, load_mode_config
from inferlab.benchmarks.quantization import QuantizationMatrix
from inferlab.benchmarks.runners import SpecdecRunner
from inferlab.cli import specdec_flags
from inferlab.cli.bench_flags import (
    COMPARING,
    FLAGS,
    only_specdec,
    refuse_misplaced,
    specdec_config,
)
from inferlab.cli.bench_output import BenchOutput, name_places, names_of
from inferlab.cli.parser import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK
from inferlab.cli.profiling import check_profile, profiling
from inferlab.cli.prompts import gather_workload
from inferlab.cli.terminal import progress, setup_logging
from inferlab.config import SpecdecConfig
from inferlab.errors import UsageError
from inferlab.prompts import Prompt


def run(args: argparse.Namespace) -> int:
    """Runs what measures here; returns the exit code, as `inferlab.cli.bench.run` has it."""
    if args.quantization_matrix:
        return _run_matrix(args)
    if args.modes is not None:
        return _run_modes(args)
    args.mode = args.mode or "local"
    refuse_misplaced(args)
    if args.batch is not None:
        raise UsageError("--batch: is of --modes and --peers; a single mode runs prompt by prompt")
    overrides, names = specdec_flags.given_overrides(args, FLAGS[args.mode])
    config = load_mode_config(args.mode, args.config, overrides, names)
    output = BenchOutput(args)
    check_profile(args.profile, output.paths)
    prompts = gather_workload(args)
    if isinstance(config, SpecdecConfig):
        specdec_flags.check_record(config)
    setup_logging(config.log_level, args.verbose)
    with output:
        stats, interrupted = _measure(args, config, prompts, output.keep)
        name_places(stats["failures"], prompts)
        if "baseline_comparison" in stats:
            name_places(stats["baseline_comparison"]["token_ids"]["differences"], prompts)
        output.done(stats)
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILURE if _failed(stats) else EXIT_OK


def _run_modes(args: argparse.Namespace) -> int:
    """``--modes``: the table of all draft modes."""
    for flag in (
        "--compare-baseline", "--eval-perplexity", "--stream", "--draft-mode", "--profile"
    ):  # fmt: skip
        if getattr(args, flag[2:].replace("-", "_")):
            raise UsageError(f"{flag}: has no meaning with --modes, which compares all of them")
    if args.heads is not None:
        raise UsageError(
            "--heads: belongs to one draft mode; with --modes name heads in the --config file: "
            f"medusa: {{model: {args.heads}}}, or eagle: {{model: {args.heads}}}"
        )
    if args.record is not None:
        raise UsageError("--record: records one draft mode; give --mode specdec --draft-mode MODE")
    only_specdec(args, "--modes")
    if (args.prompt, args.prompts, args.heldout) == (None, None, None):
        args.heldout = 20
    config, _ = specdec_config(args, COMPARING)
    output = BenchOutput(args)
    prompts = gather_workload(args)
    setup_logging(config.log_level, args.verbose)
    modes = DRAFT_MODES if args.modes == ["all"] else args.modes
    with output:
        benchmark = _modes_benchmark(config, modes, args.batch or (1,))
        show_bar = not (args.no_progress or args.json)
        with progress(benchmark.num_runs(len(prompts)), "runs", show_bar) as advance:
            texts = [prompt.text for prompt in prompts]
            result = benchmark.run(texts, advance, names=names_of(prompts), keep=output.keep)
        name_places(result.failures, prompts)
        for found in result.token_ids.values():
            name_places(found["differences"], prompts)
        output.done(result.as_dict())
    if result.interrupted:
        return EXIT_INTERRUPTED
    different = any(found["verdict"] == "different" for found in result.token_ids.values())
    return EXIT_FAILURE if result.failures or different else EXIT_OK


def _run_matrix(args: argparse.Namespace) -> int:
    """``--quantization-matrix``: the tables of all formats."""
    for flag in (
        "--compare-baseline", "--eval-perplexity", "--stream", "--modes", "--batch", "--record",
        "--profile", "--quantization", "--draft-quantization", "--kv-cache-dtype",
    ):  # fmt: skip
        if getattr(args, flag[2:].replace("-", "_")):
            raise UsageError(f"{flag}: has no meaning with --quantization-matrix")
    only_specdec(args, "--quantization-matrix")
    if (args.prompt, args.prompts, args.heldout) == (None, None, None):
        args.heldout = 8
    # Always as many drafts, so that what is accepted can be compared.
    config, _ = specdec_config(args, {"controller": "fixed"})
    output = BenchOutput(args)
    texts = [prompt.text for prompt in gather_workload(args)]
    setup_logging(config.log_level, args.verbose)
    with output:
        try:
            matrix = QuantizationMatrix(config)
            with progress(
                matrix.num_runs(len(texts)), "runs", not (args.no_progress or args.json)
            ) as advance:
                stats = matrix.run(texts, advance, output.keep)
        except ValueError as error:
            raise UsageError(str(error)) from error
        output.done(stats)
    if stats["interrupted"]:
        return EXIT_INTERRUPTED
    return EXIT_FAILURE if stats["failures"] else EXIT_OK


def _modes_benchmark(
    config: SpecdecConfig, modes: Sequence[str], sizes: Sequence[int]
) -> ModesBenchmark:
    """One whose complaints name the flags."""
    try:
        return ModesBenchmark(config, modes, sizes)
    except ValueError as error:
        text = re.sub("^modes ", "--modes ", re.sub("^batch_sizes ", "--batch ", str(error)))
        raise UsageError(text) from error


def _measure(
    args: argparse.Namespace,
    config: Config,
    prompts: Sequence[Prompt],
    keep: Callable[[dict[str, Any]], None],
) -> tuple[dict[str, Any], bool]:
    """(statistics, whether Ctrl-C ended it)."""
    show_bar = not (args.no_progress or args.json)
    with BenchmarkRunner(
        mode=args.mode,
        compare_baseline=args.compare_baseline,
        eval_perplexity=args.eval_perplexity,
        stream=args.stream,
        config=config,
    ) as benchmark:
        try:
            with progress(benchmark.num_runs(len(prompts)), "runs", show_bar) as advance:
                texts, names = [prompt.text for prompt in prompts], names_of(prompts)
                stats = benchmark.run_all(texts, on_run=advance, names=names, keep=keep)
            if args.profile and "error" not in stats:
                _profile(benchmark, texts[stats["raw_results"][0]["prompt_index"]], args.profile)
            return stats, False
        except BenchmarkInterrupted as interrupt:
            return interrupt.stats, True


def _profile(benchmark: BenchmarkRunner, prompt: str, path: str) -> None:
    """One more run, which counts nowhere: a profiled one takes longer."""
    runner = benchmark.runner
    assert isinstance(runner, SpecdecRunner)
    with profiling(runner.pipeline.engine, path):
        runner.run(prompt)


def _failed(stats: dict[str, Any]) -> bool:
    if "error" in stats:
        print(f"error: {stats['error']}", file=sys.stderr)
        return True
    verdict = stats.get("baseline_comparison", {}).get("token_ids", {}).get("verdict")
    return bool(stats["failures"]) or verdict == "different"
