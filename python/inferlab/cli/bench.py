"""`inferlab bench`: measure local, HTTP or speculative decoding, and compare speculation."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from inferlab.benchmarks.benchmark import (
    MODES,
    BenchmarkInterrupted,
    BenchmarkRunner,
    Config,
    load_mode_config,
)
from inferlab.benchmarks.modes import DRAFT_MODES, ModesBenchmark
from inferlab.benchmarks.outputs import BenchmarkStats, MatrixStats, ModesStats, PeersStats
from inferlab.benchmarks.quantization import QuantizationMatrix
from inferlab.benchmarks.runners import SpecdecRunner
from inferlab.cli import peers, ping, specdec_flags
from inferlab.cli.bench_flags import FLAGS, name_list, number_list, only_specdec, refuse_misplaced
from inferlab.cli.bench_output import BenchOutput, name_places, names_of
from inferlab.cli.flags import add_config_argument, add_output_arguments
from inferlab.cli.load_flags import add_load_arguments, first_load_flag
from inferlab.cli.parser import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK
from inferlab.cli.profiling import add_profile_argument, check_profile, profiling
from inferlab.cli.prompts import add_workload_arguments, gather_workload
from inferlab.cli.terminal import progress, setup_logging
from inferlab.config import SpecdecConfig
from inferlab.errors import UsageError
from inferlab.load.outputs import LoadStats, SweepStats
from inferlab.prompts import Prompt

Output = BenchmarkStats | ModesStats | MatrixStats | PeersStats | LoadStats | SweepStats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab bench``."""
    parser.epilog = "`inferlab bench report FILE.json` makes the tables and plots of a result of "
    parser.epilog += "--output again;\n`inferlab bench compare A.json B.json` compares two of them."
    add_workload_arguments(parser)
    parser.add_argument(
        "--mode",
        choices=MODES,
        help="Hugging Face generate, an OpenAI-compatible server, or the engine (local)",
    )
    parser.add_argument("--iterations", type=int, metavar="N", help="runs of each prompt (5)")
    parser.add_argument("--warmup", type=int, metavar="N", help="runs before, not counted (1)")
    parser.add_argument(
        "--compare-baseline",
        action="store_true",
        help="specdec: also run plain decoding and Hugging Face generate, in turn; compare tokens",
    )
    parser.add_argument(
        "--eval-perplexity", action="store_true", help="perplexity of the output under the target"
    )
    parser.add_argument(
        "--stream", action="store_true", help="http: stream, and measure TTFT and TPOT"
    )
    parser.add_argument(
        "--modes",
        type=name_list,
        metavar="all|MODE,...",
        help="compare draft modes (all, or some) with plain decoding and Hugging Face's ways; "
        "by default on --heldout 20, 128 tokens, the cost controller, 3 iterations",
    )
    parser.add_argument(
        "--batch",
        type=number_list,
        metavar="N,...",
        help="of --modes and --peers: prompts decoded together (1)",
    )
    parser.add_argument(
        "--quantization-matrix",
        action="store_true",
        help="compare the formats of --quantization, of the target and of its draft model: memory, "
        "forward times, perplexity of the prompts, acceptance, speed; by default on --heldout 8",
    )
    peers.add_arguments(parser)
    add_config_argument(parser, "configs/specdec.yaml")
    ping.add_server_arguments(parser)
    add_load_arguments(parser)
    specdec_flags.add_model_arguments(parser)
    specdec_flags.add_speculation_arguments(parser)
    specdec_flags.add_sampling_arguments(parser)
    specdec_flags.add_record_argument(parser)
    add_profile_argument(parser, "one more run of the first prompt, after the measured ones,")
    add_output_arguments(parser, output=None)
    parser.add_argument(
        "--output",
        metavar="PREFIX",
        help="write PREFIX.json (all), PREFIX.csv (a row per run), PREFIX.md and PREFIX.html "
        "(tables and plots; with --quantization-matrix PREFIX.png, too, by matplotlib); until then "
        "the runs are in PREFIX.json.part, a JSON line each",
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab bench``; returns the exit code.

    1: a run failed, or token ids differ that must not, or a load spent its error budget; 130:
    interrupted, with partial results.
    """
    if args.peers is None:
        peers.refuse_alone(args)
    if (flag := first_load_flag(args)) is not None:
        return _run_load(args, flag)
    if args.peers is not None:
        return peers.run(args)
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


def _run_load(args: argparse.Namespace, flag: str) -> int:
    """``--mode http`` with a flag of a load."""
    try:
        from inferlab.cli import load
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise UsageError(
            f"{flag}: a load needs aiohttp: pip install 'llm-inference-lab[load]'"
        ) from None
    load.refuse_misplaced(args, flag)
    refuse_misplaced(args)
    return load.run(args)


MODES_DEFAULTS = {"max_new_tokens": 128, "controller": "cost", "iterations": 3}
"""Of ``--modes``, where neither flag nor file says otherwise."""


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
    overrides, names = specdec_flags.given_overrides(args, FLAGS["specdec"])
    defaults = {} if args.config else {k: v for k, v in MODES_DEFAULTS.items() if k not in names}
    config = load_mode_config("specdec", args.config, {**defaults, **overrides}, names)
    assert isinstance(config, SpecdecConfig)
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
        "--profile", "--quantization", "--draft-quantization",
    ):  # fmt: skip
        if getattr(args, flag[2:].replace("-", "_")):
            raise UsageError(f"{flag}: has no meaning with --quantization-matrix")
    only_specdec(args, "--quantization-matrix")
    if (args.prompt, args.prompts, args.heldout) == (None, None, None):
        args.heldout = 8
    overrides, names = specdec_flags.given_overrides(args, FLAGS["specdec"])
    # Always as many drafts, so that what is accepted can be compared.
    defaults = {} if args.config or "controller" in overrides else {"controller": "fixed"}
    config = load_mode_config("specdec", args.config, {**defaults, **overrides}, names)
    assert isinstance(config, SpecdecConfig)
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
