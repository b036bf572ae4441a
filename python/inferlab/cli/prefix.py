"""``--output PREFIX``: the files that it means, and what stands beside them while they are made."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from inferlab.benchmarks.tables import output_paths
from inferlab.errors import UsageError
from inferlab.output import Journal, check_output, is_special

logger = logging.getLogger(__name__)


def check_prefix(prefix: str) -> tuple[Path, Path]:
    """PREFIX.json and PREFIX.csv; refused where they cannot be written."""
    if is_special(prefix):
        raise UsageError(f"--output: {prefix} is no file; PREFIX.json and PREFIX.csv are written")
    check_output(prefix)
    paths = output_paths(prefix)
    for path in paths:
        check_output(path)
    return paths


@contextlib.contextmanager
def journal_beside(path: Path | None = None) -> Iterator[Journal]:
    """The runs as they are made; it stays where an error comes before the file is written."""
    journal = Journal(path)
    if journal.path is not None:
        logger.info("runs are in %s while it measures", journal.path)
    try:
        yield journal
    finally:
        journal.close(written=False)
