"""`python -m inferlab.server.local_baseline` is `inferlab baseline`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from inferlab.baseline import LocalBaselineRunner as LocalBaselineRunner


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    from inferlab.cli import run_command

    return run_command("baseline", argv)


if __name__ == "__main__":
    sys.exit(main())
