"""What `inferlab bench` writes while it measures and afterwards, and how its rows name prompts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from inferlab.benchmarks.tables import output_paths
from inferlab.errors import UsageError
from inferlab.output import Journal, check_output, is_special
from inferlab.prompts import Prompt

logger = logging.getLogger(__name__)


def check_prefix(prefix: str) -> tuple[Path, Path]:
    """The files that ``--output`` means; refused where they cannot be written."""
    if is_special(prefix):
        raise UsageError(f"--output: {prefix} is no file; PREFIX.json and PREFIX.csv are written")
    check_output(prefix)
    paths = output_paths(prefix)
    for path in paths:
        check_output(path)
    return paths


@contextlib.contextmanager
def journal_of(path: Path | None = None) -> Iterator[Journal]:
    """The runs as they are made; it stays where an error comes before the file is written."""
    journal = Journal(path)
    if journal.path is not None:
        logger.info("runs are in %s while it measures", journal.path)
    try:
        yield journal
    finally:
        journal.close(written=False)


def names_of(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.where or f"prompt {index}" for index, prompt in enumerate(prompts)]


def name_places(rows: Sequence[dict[str, Any]], prompts: Sequence[Prompt]) -> None:
    """Adds ``where``, the prompt's line in its file, to rows that have its index."""
    for row in rows:
        if (where := prompts[row["prompt_index"]].where) is not None:
            row["where"] = where
