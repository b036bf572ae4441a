"""`python -m inferlab.server.ping_vllm` is `inferlab ping`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from inferlab.client.ping import VLLMPingClient as VLLMPingClient


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    from inferlab.cli import run_command

    return run_command("ping", argv)


if __name__ == "__main__":
    sys.exit(main())
