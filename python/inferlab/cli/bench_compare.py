"""`inferlab bench compare`: two results side by side, with an exit status for CI."""

from __future__ import annotations

import argparse

from inferlab.benchmarks.compare import CompareStats, compare_results
from inferlab.benchmarks.compare_report import compare_report
from inferlab.benchmarks.result_files import check_files, output_stem
from inferlab.cli.bench_output import read_whole
from inferlab.cli.flags import add_log_arguments
from inferlab.cli.parser import EXIT_FAILURE, EXIT_OK
from inferlab.cli.terminal import clean_stdout
from inferlab.errors import UsageError
from inferlab.output import print_json, write_json
from inferlab.reports.files import SUFFIXES, write_report
from inferlab.reports.terminal import print_report

Output = CompareStats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab bench compare``."""
    parser.add_argument("a", metavar="A.json", help="the result that the other is compared with")
    parser.add_argument("b", metavar="B.json", help="the other")
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="SHARE",
        default=0.05,
        help="a slow-down by more, and beyond chance, fails (0.05)",
    )
    parser.add_argument(
        "--acceptance-tolerance",
        type=float,
        metavar="SHARE",
        default=0.01,
        help="accepted length or acceptance rate fallen by more fails (0.01)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, nothing else, on stdout"
    )
    parser.add_argument(
        "--output", metavar="PREFIX", help="write PREFIX.json, PREFIX.md and PREFIX.html"
    )
    add_log_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab bench compare``; 1: B is slower, accepts less or fails more often than A."""
    for flag in ("--tolerance", "--acceptance-tolerance"):
        value = getattr(args, flag[2:].replace("-", "_"))
        if not 0 <= value < 1:
            raise UsageError(f"{flag}: {value} is not allowed; must be a share, from 0 to below 1")
    stem = None
    if args.output:
        stem = output_stem(args.output)
        check_files(args.output, (".json", *SUFFIXES))
    stats = compare_results(
        read_whole(args.a),
        read_whole(args.b),
        names=(args.a, args.b),
        tolerance=args.tolerance,
        acceptance_tolerance=args.acceptance_tolerance,
    )
    report = compare_report(stats)
    with clean_stdout(args.json) as out:
        if stem is not None:
            write_json(f"{stem}.json", stats)
            write_report(report, stem)
        if args.json:
            print_json(stats, out)
        else:
            print_report(report)
    return EXIT_FAILURE if stats["regressions"] else EXIT_OK
