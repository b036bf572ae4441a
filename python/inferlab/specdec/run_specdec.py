"""`python -m inferlab.specdec.run_specdec` is `inferlab specdec`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    from inferlab.cli import run_command

    return run_command("specdec", argv)


if __name__ == "__main__":
    sys.exit(main())
