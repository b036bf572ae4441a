"""The `inferlab` command: one name for all commands of the package, one file for each of them."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from inferlab import __version__
from inferlab.cli.completion import SHELLS, PrintCompletion
from inferlab.cli.parser import Parser, call
from inferlab.cli.terminal import setup_logging
from inferlab.machine import launched_as

COMMANDS = {
    "specdec": "decode speculatively, on real models or fake ones",
    "baseline": "decode plainly, by Hugging Face generate",
    "chat": "talk to a model at the terminal, decoded speculatively",
    "advise": "say what to draft with on this machine, and what it is worth",
    "bench": "measure local, speculative or HTTP decoding",
    "bench compare": "compare two results of bench: speed, acceptance, token ids",
    "bench report": "the tables of a result of bench, as Markdown and HTML with plots",
    "certify": "prove that decoding loses nothing, judge divergences, measure quality",
    "serve": "serve a model over HTTP, as OpenAI's API does",
    "ping": "try an OpenAI-compatible server",
    "train": "train draft models, Medusa and EAGLE heads",
    "replay": "evaluate other settings on recorded steps, without models",
    "simulate": "plan capacity: replicas, routing and drafting on a virtual clock",
    "quantize": "pack a model's weights in 8 or 4 bits, as a directory of its own",
    "calibrate": "measure acceptance, for optimal trees",
    "schema": "the JSON schema of what a command prints with --json",
    "doctor": "what is built in, what this machine offers, what is missing",
}
"""Command, of one word or two -> summary; the module of that name has its ``add_arguments`` and its
``run``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``inferlab <command> ...``; returns the exit code.

    Only the command asked for is imported: torch takes seconds, ``--help`` must not.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return call(lambda args: _run(words), argparse.Namespace(verbose="--verbose" in words))


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """Runs one command, whose own words are ``argv`` (None: the process's); returns the exit code.

    This is what modules that can be run themselves call, such as `inferlab.specdec.run_specdec`.
    """
    return main([name, *(sys.argv[1:] if argv is None else argv)])


def make_parser(only: str | None = None) -> Parser:
    """The parser of all commands; the flags of ``only`` one of them, or (None) of each."""
    parser = Parser(
        prog="inferlab",
        description="Speculative decoding: faster than plain decoding, and exactly as good.",
        epilog="`inferlab <command> --help` lists the flags of a command.",
    )
    parser.add_argument("--version", action="version", version=f"inferlab {__version__}")
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        action=PrintCompletion,
        make_parser=make_parser,
        help="print a script by which the shell completes commands and flags",
    )
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    for name, summary in COMMANDS.items():
        description = summary[0].upper() + summary[1:] + "."
        command = commands.add_parser(
            name, prog=f"inferlab {name}", help=summary, description=description
        )
        if only in (name, None):
            module = module_of(name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def module_of(command: str) -> ModuleType:
    """The module of a command."""
    return importlib.import_module(f"inferlab.cli.{command.replace(' ', '_')}")


def _run(words: list[str]) -> int:
    if " ".join(words[:2]) in COMMANDS:
        words = [" ".join(words[:2]), *words[2:]]
    args = make_parser(only=words[0] if words else "").parse_args(words)
    setup_logging(args.log_level or "INFO", args.verbose)
    rank, _ = launched_as()
    if rank > 0 and hasattr(args, "tensor_parallel"):
        from inferlab.models.parallel.follower import follow

        follow()
    return int(args.run(args))
