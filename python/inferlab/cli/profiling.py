"""The flag `--profile`, of `specdec` and `bench --mode specdec`."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from inferlab.errors import UsageError
from inferlab.output import check_output, is_special

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


def check_profile(path: str | None, results: Sequence[str | Path]) -> None:
    """Refuses a file of ``--profile`` before the run.

    Args:
        results: files of ``--output``, which it would overwrite.

    Raises:
        UsageError: it cannot be written, or is one of those.
    """
    check_output(path, "--profile")
    places = [os.path.realpath(result) for result in results]
    if path is not None and not is_special(path) and os.path.realpath(path) in places:
        raise UsageError(f"--profile: {path} is a file of --output, too; give another")


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
