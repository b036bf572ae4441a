"""`inferlab bench --peers`: other engines side by side with ours."""

from __future__ import annotations

import argparse
import re
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inferlab.benchmarks.names import PEER_TIMEOUT_S, SPECULATIVE
from inferlab.benchmarks.peers import PEERS
from inferlab.cli.bench_flags import COMPARING, name_list, only_specdec, specdec_config
from inferlab.cli.bench_output import BenchOutput, name_places, names_of
from inferlab.cli.parser import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK
from inferlab.cli.prompts import gather_workload
from inferlab.cli.terminal import progress, setup_logging
from inferlab.config import SpecdecConfig
from inferlab.errors import UsageError

if TYPE_CHECKING:
    from inferlab.benchmarks.side_by_side import SideBySide

ONLY_HERE = ("--peer-python", "--peer-models", "--peer-timeout")
ELSEWHERE = (
    "--compare-baseline", "--eval-perplexity", "--stream", "--modes", "--quantization-matrix",
    "--record", "--profile",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--peers`` and what belongs to it."""
    group = parser.add_argument_group("other engines")
    group.add_argument(
        "--peers",
        type=name_list,
        metavar="all|NAME,...",
        help=f"compare with other engines ({', '.join(PEERS)}; all: those that are installed), "
        "each in its own process, in turns with plain and speculative decoding; by default on "
        "--heldout 8, 128 tokens, the cost controller, 3 iterations",
    )
    group.add_argument(
        "--peer-python",
        action="append",
        metavar="[NAME=]PATH",
        help="the Python that has a peer, or all that are not named; may be given repeatedly",
    )
    group.add_argument(
        "--peer-models",
        metavar="DIR",
        help="keep converted models there for the next time (a temporary folder)",
    )
    group.add_argument(
        "--peer-timeout",
        type=float,
        metavar="SECONDS",
        help=f"a peer that takes longer for an answer is ended ({PEER_TIMEOUT_S:g})",
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab bench --peers``; returns the exit code.

    1: a peer that was named could not be measured, a run failed, or speculation's ids differ from
    plain decoding's where they must not. Ids of peers that differ are told of, and no failure.
    """
    for flag in ELSEWHERE:
        if getattr(args, flag[2:].replace("-", "_")):
            raise UsageError(f"{flag}: has no meaning with --peers")
    only_specdec(args, "--peers")
    if (args.prompt, args.prompts, args.heldout) == (None, None, None):
        args.heldout = 8
    config, names = specdec_config(args, COMPARING)
    output = BenchOutput(args)
    benchmark = _benchmark(args, config, names)
    prompts = gather_workload(args)
    setup_logging(config.log_level, args.verbose)
    with output:
        show_bar = not (args.no_progress or args.json)
        with progress(benchmark.num_runs(len(prompts)), "runs", show_bar) as advance:
            texts = [prompt.text for prompt in prompts]
            stats = benchmark.run(texts, advance, names=names_of(prompts), keep=output.keep)
        name_places(stats["failures"], prompts)
        for engines in stats["token_ids"].values():
            for found in engines.values():
                name_places(found["differences"], prompts)
        output.done(stats)
    if stats["interrupted"]:
        return EXIT_INTERRUPTED
    different = any(
        name == SPECULATIVE and found["verdict"] == "different"
        for engines in stats["token_ids"].values()
        for name, found in engines.items()
    )
    unmeasured = stats["left_out"] and args.peers != ["all"]
    return EXIT_FAILURE if stats["failures"] or different or unmeasured else EXIT_OK


def refuse_alone(args: argparse.Namespace) -> None:
    """Flags that need ``--peers``."""
    for flag in ONLY_HERE:
        if getattr(args, flag[2:].replace("-", "_")) is not None:
            raise UsageError(f"{flag}: belongs to --peers; give both")


def _benchmark(
    args: argparse.Namespace, config: SpecdecConfig, flags: dict[str, str]
) -> SideBySide:
    """One whose complaints name the flags."""
    from inferlab.benchmarks.side_by_side import SideBySide

    timeout_s = PEER_TIMEOUT_S if args.peer_timeout is None else args.peer_timeout
    if not 0 < timeout_s <= threading.TIMEOUT_MAX:
        raise UsageError(
            f"--peer-timeout: {timeout_s:g} is not allowed; must be above 0, and at most "
            f"{threading.TIMEOUT_MAX:g}"
        )
    folder = None if args.peer_models is None else Path(args.peer_models)
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = error.strerror or error
            raise UsageError(f"--peer-models: {folder} cannot be made: {why}") from None
    peers = list(PEERS) if args.peers == ["all"] else list(dict.fromkeys(args.peers))
    try:
        return SideBySide(
            config,
            peers,
            args.batch or (1,),
            pythons=_pythons(args.peer_python or ()),
            folder=folder,
            timeout_s=timeout_s,
        )
    except ValueError as error:
        text = re.sub("^peers ", "--peers ", re.sub("^batch_sizes ", "--batch ", str(error)))
        key = text.partition(" ")[0]
        raise UsageError(text.replace(key, flags.get(key, key), 1)) from error


def _pythons(given: Any) -> dict[str | None, str]:
    """Interpreters by peer, of ``--peer-python``."""
    pythons: dict[str | None, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or (name not in PEERS and shutil.which(text) is not None):
            name, path = None, text
        elif name not in PEERS:
            raise UsageError(f"--peer-python: {name} is no peer; known are {', '.join(PEERS)}")
        found = shutil.which(str(Path(path).expanduser()))
        if found is None:
            raise UsageError(f"--peer-python: {path} is no program that can be run")
        pythons[name] = found
    return pythons
