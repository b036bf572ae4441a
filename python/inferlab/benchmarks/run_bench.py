"""`python -m inferlab.benchmarks.run_bench` is `inferlab bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from inferlab.benchmarks.benchmark import BenchmarkInterrupted as BenchmarkInterrupted
from inferlab.benchmarks.benchmark import BenchmarkRunner as BenchmarkRunner


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    from inferlab.cli import run_command

    return run_command("bench", argv)


if __name__ == "__main__":
    sys.exit(main())
