"""`inferlab bench report`: the report of a result, from its file."""

from __future__ import annotations

import argparse

from inferlab.benchmarks.result_files import check_files, output_stem, report_of
from inferlab.cli.bench_output import read_whole
from inferlab.cli.flags import add_log_arguments
from inferlab.cli.parser import EXIT_OK
from inferlab.reports.files import SUFFIXES, write_report
from inferlab.reports.terminal import print_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab bench report``."""
    parser.add_argument("file", metavar="FILE.json", help="what `inferlab bench --output` wrote")
    parser.add_argument(
        "--output", metavar="PREFIX", help="write PREFIX.md and PREFIX.html (tables and plots)"
    )
    add_log_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab bench report``; returns the exit code."""
    if args.output:
        check_files(args.output, SUFFIXES)
    report = report_of(read_whole(args.file))
    if args.output:
        write_report(report, output_stem(args.output))
    print_report(report)
    return EXIT_OK
