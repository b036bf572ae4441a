"""`inferlab advise`: what to draft with on this machine, what it is worth, and what it needs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from inferlab.benchmarks.advice_report import AdviceStats, as_json, draw, report
from inferlab.benchmarks.advisor import BATCHES, Advisor
from inferlab.cli import specdec_flags
from inferlab.cli.flags import add_config_argument, add_log_arguments
from inferlab.cli.parser import EXIT_OK
from inferlab.cli.prompts import add_workload_arguments, gather_workload
from inferlab.cli.terminal import clean_stdout, progress, setup_logging
from inferlab.config import SpecdecConfig, load_config
from inferlab.errors import UsageError
from inferlab.output import check_output, print_json, replace_file, write_json
from inferlab.plots import check_plot

Output = AdviceStats

HELDOUT = 24
"""Prompts, where none are given."""
ITERATIONS = 3
MEANINGLESS = (
    "--K",
    "--max-draft",
    "--tree",
    "--tree-nodes",
    "--tree-width",
    "--controller",
    "--adaptive-K",
    "--min-k",
    "--target-acceptance",
)
"""Flags of `inferlab specdec` that say how much to draft."""
STDOUT = "-"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab advise``."""
    add_workload_arguments(parser)
    parser.add_argument(
        "--batch",
        type=_sizes,
        metavar="N,...",
        default=BATCHES,
        help=f"prompts decoded together ({','.join(map(str, BATCHES))})",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="run the best setting of each batch size in turns with plain decoding, and compare",
    )
    parser.add_argument(
        "--iterations",
        type=int,
        metavar="N",
        help=f"runs of each prompt for --verify ({ITERATIONS})",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE.svg|png",
        help="draw the acceptance that pays, and the one there is, against the batch size",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write it as JSON to FILE; without FILE print that, nothing else, on stdout",
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    add_log_arguments(parser)
    add_config_argument(parser, "configs/specdec.yaml")
    specdec_flags.add_model_arguments(parser)
    specdec_flags.add_speculation_arguments(parser, several_modes=True)
    specdec_flags.add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab advise``; returns the exit code."""
    config, modes = _configured(args)
    if (args.prompt, args.prompts, args.heldout) == (None, None, None):
        args.heldout = HELDOUT
    prompts = gather_workload(args)
    for prompt in prompts:
        try:
            prompt.check()
        except ValueError as error:
            raise UsageError(f"{prompt.where or '--prompt'}: {error}") from None
    texts = [prompt.text for prompt in prompts]
    setup_logging(config.log_level, args.verbose)
    on_stdout = args.json == STDOUT
    shows = not (args.no_progress or on_stdout)
    with clean_stdout(on_stdout) as out:
        advisor = Advisor(config, modes, args.batch)
        for prompt in prompts:
            try:
                advisor.check(prompt.text)
            except ValueError as error:
                raise UsageError(f"{prompt.where or '--prompt'}: {error}") from None
        with progress(advisor.num_groups(len(texts)), "batches", shows) as advance:
            advice = advisor.run(texts, advance)
        verified = None
        if args.verify:
            with progress(advisor.num_runs(advice, len(texts)), "runs", shows) as advance:
                verified = advisor.verify(advice, texts, advance)
        if args.plot is not None:
            path = Path(args.plot)
            replace_file(path, draw(advice, path))
        stats = as_json(advice, verified)
        if on_stdout:
            print_json(stats, out)
        else:
            if args.json is not None:
                write_json(args.json, stats, "--json")
            print(report(advice, verified))
    return EXIT_OK


def _configured(args: argparse.Namespace) -> tuple[SpecdecConfig, list[str] | None]:
    """The configuration, and the draft modes that were asked for.

    Raises:
        UsageError: flags that mean nothing here, or files that cannot be written.
    """
    for flag in MEANINGLESS:
        if getattr(args, flag[2:].replace("-", "_")):
            raise UsageError(
                f"{flag}: has no meaning here: how much to draft is what is advised; --max-k "
                "bounds the levels that are weighed"
            )
    if args.iterations is not None and not args.verify:
        raise UsageError("--iterations: is of --verify; give that too")
    if args.plot is not None:
        check_plot(args.plot, "--plot")
    if args.json not in (None, STDOUT):
        check_output(args.json, "--json")
    modes, args.draft_mode = args.draft_mode, None
    if modes is not None and len(modes) == 1:
        (args.draft_mode,) = modes  # whose heads --heads names
    flags = {**specdec_flags.FLAGS, "--iterations": "iterations"}
    del flags["--draft-mode"]
    overrides, names = specdec_flags.given_overrides(args, flags)
    defaults: dict[str, Any] = {} if args.config else {"iterations": ITERATIONS}
    config = load_config(SpecdecConfig, args.config, {**defaults, **overrides}, names=names)
    return config, modes


def _sizes(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers: 1,4,16")
    return [int(size) for size in text.split(",")]
