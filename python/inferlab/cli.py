"""The `inferlab` command: one name for all commands of the package."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from inferlab import __version__
from inferlab.cli_common import Parser, call

COMMANDS = {
    "specdec": (
        "inferlab.specdec.run_specdec",
        "decode speculatively, on real models or fake ones",
    ),
    "baseline": ("inferlab.server.local_baseline", "decode plainly, by Hugging Face generate"),
    "bench": ("inferlab.benchmarks.run_bench", "measure local, speculative or HTTP decoding"),
    "ping": ("inferlab.server.ping_vllm", "try an OpenAI-compatible server"),
    "train": ("inferlab.training.train", "train draft models, Medusa and EAGLE heads"),
    "calibrate": ("inferlab.training.calibrate", "measure acceptance, for optimal trees"),
    "doctor": ("inferlab.doctor", "what is built in, what this machine offers, what is missing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``inferlab <command> ...``; returns the exit code.

    Only the command asked for is imported: torch takes seconds, ``--help`` must not.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return call(lambda args: _run(words), argparse.Namespace(verbose="--verbose" in words))


def _run(words: list[str]) -> int:
    parser = Parser(
        prog="inferlab",
        description="Speculative decoding: faster than plain decoding, and exactly as good.",
        epilog="`inferlab <command> --help` lists the flags of a command.",
    )
    parser.add_argument("--version", action="version", version=f"inferlab {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        description = summary[0].upper() + summary[1:] + "."
        command = commands.add_parser(
            name, prog=f"inferlab {name}", help=summary, description=description
        )
        if words[:1] == [name]:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(words)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
