"""The flag `--profile`, of `specdec` and `bench --mode specdec`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inferlab.specdec.engine import Engine

logger = logging.getLogger(__name__)


def add_profile_argument(parser: argparse.ArgumentParser, of_what: str) -> None:
    """``--profile FILE``."""
    parser.add_argument(
        "--profile",
        metavar="FILE.json",
        help=f"write a trace of {of_what} for ui.perfetto.dev: operations, and the engine's phases "
        "on a track of their own (on CUDA also as NVTX ranges)",
    )


@contextmanager
def profiling(engine: Engine, path: str | None) -> Iterator[None]:
    """Profiles what the engine does meanwhile into the file of ``--profile``; without one, nothing.

    Raises:
        UsageError: it cannot be written.
    """
    if path is None:
        yield
        return
    from inferlab.specdec.profiling import profiled

    with profiled(engine, path):
        yield
    logger.info("the trace is in %s; open it in https://ui.perfetto.dev", path)
