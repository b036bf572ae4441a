"""`inferlab bench`: measure local, HTTP or speculative decoding, and compare speculation."""

from __future__ import annotations

import argparse

from inferlab.benchmarks.names import MODES
from inferlab.benchmarks.outputs import BenchmarkStats, MatrixStats, ModesStats, PeersStats
from inferlab.cli import peers, ping, specdec_flags
from inferlab.cli.bench_flags import name_list, number_list, refuse_misplaced
from inferlab.cli.flags import add_config_argument, add_output_arguments
from inferlab.cli.load_flags import add_load_arguments, first_load_flag
from inferlab.cli.profiling import add_profile_argument
from inferlab.cli.prompts import add_workload_arguments
from inferlab.errors import UsageError
from inferlab.load.outputs import LoadStats, SweepStats

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
    from inferlab.cli import bench_local  # torch takes seconds, a load must not

    return bench_local.run(args)


def _run_load(args: argparse.Namespace, flag: str) -> int:
    """``--mode http`` with a flag of a load."""
    try:
        from inferlab.cli import load
    except ModuleNotFoundError as error:
        if error.name not in ("aiohttp", "orjson", "prometheus_client"):
            raise
        raise UsageError(
            f"{flag}: a load needs {error.name}: pip install 'llm-inference-lab[load]'"
        ) from None
    load.refuse_misplaced(args, flag)
    refuse_misplaced(args)
    return load.run(args)
