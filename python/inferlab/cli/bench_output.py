"""Where the results of `inferlab bench` go: stdout, the files of ``--output``, and the journal."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from inferlab.benchmarks.outputs import BenchmarkStats, MatrixStats, ModesStats, PeersStats
from inferlab.benchmarks.result_files import (
    WRITTEN,
    check_files,
    read_result,
    report_of,
    write_outputs,
)
from inferlab.cli.terminal import clean_stdout
from inferlab.errors import UsageError
from inferlab.load.outputs import LoadStats, SweepStats
from inferlab.load.recomputed import recomputed_load, recomputed_sweep
from inferlab.output import Journal, print_json
from inferlab.prompts import Prompt
from inferlab.reports.terminal import print_report

logger = logging.getLogger(__name__)


class BenchOutput:
    """Takes the runs of a benchmark as they are made, and its result, once.

    While it is entered nothing but JSON comes on stdout with ``--json``; the journal of the runs
    stays where an error comes before the files are written.

    Attributes:
        paths: of its files; none without ``--output``.

    Args:
        as_csv: a result's rows, where they are not its ``runs``.

    Raises:
        UsageError: what ``--output`` means cannot be written.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        as_csv: Callable[[Mapping[str, Any]], str] | None = None,
    ) -> None:
        self._args = args
        self._as_csv = as_csv
        self.paths = check_files(args.output, WRITTEN) if args.output else []

    def __enter__(self) -> BenchOutput:
        with contextlib.ExitStack() as stack:
            self._out = stack.enter_context(clean_stdout(self._args.json))
            self._journal = Journal(self.paths[0] if self.paths else None)
            stack.callback(self._journal.close, written=False)
            self._stack = stack.pop_all()
        if self._journal.path is not None:
            logger.info("runs are in %s while it measures", self._journal.path)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def keep(self, run: Mapping[str, Any]) -> None:
        """Puts a run into the journal."""
        self._journal.add(run)

    def done(self, stats: Mapping[str, Any]) -> None:
        """Writes the files and prints; what cannot be written is printed all the same."""
        try:
            if self.paths:
                rows = None if self._as_csv is None else self._as_csv(stats)
                write_outputs(self._args.output, stats, rows)
                self._journal.close(written=True)
        finally:
            if self._args.json:
                print_json(stats, self._out)
            else:
                print_report(report_of(stats))


_KINDS: dict[str, Any] = {
    "engines": PeersStats,
    "batches": ModesStats,
    "pairs": MatrixStats,
    "runner_name": BenchmarkStats,
    "loads": SweepStats,
    "records": LoadStats,
}
"""A result's type, by the first key of these that it has."""


def read_whole(path: str) -> dict[str, Any]:
    """A result from its file, with everything that belongs to one of its kind; a load's figures
    are made anew from its records, and differences are logged.

    Raises:
        UsageError: as `read_result` does, or something is missing or of another type.
    """
    stats = read_result(path)
    kind = next(kind for key, kind in _KINDS.items() if key in stats)
    try:
        TypeAdapter(kind).validate_python(stats)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"{path}: {where}: {first['msg']}; measure again with --output") from None
    rows = {BenchmarkStats: "runs", SweepStats: "loads"}.get(kind)
    if rows is not None and not stats[rows]:
        raise UsageError(f"{path}: {rows}: is empty; measure again with --output")
    recomputed = {LoadStats: recomputed_load, SweepStats: recomputed_sweep}.get(kind)
    if recomputed is None:
        return stats
    try:
        stats, differences = recomputed(stats)
    except ValueError as error:
        raise UsageError(f"{path}: {error}; measure again with --output") from None
    if differences:
        logger.warning(
            "%s: %s%s; the figures of its records are used",
            path, differences[0], f" ({len(differences) - 1} more)" if differences[1:] else "",
        )  # fmt: skip
    return stats


def names_of(prompts: Sequence[Prompt]) -> list[str]:
    """How messages call them: by their line in a file, or by number."""
    return [prompt.where or f"prompt {index}" for index, prompt in enumerate(prompts)]


def name_places(rows: Sequence[Any], prompts: Sequence[Prompt]) -> None:
    """Adds ``where``, the prompt's line in its file, to rows that have its index."""
    for row in rows:
        if (where := prompts[row["prompt_index"]].where) is not None:
            row["where"] = where
