"""Results of `inferlab bench` as files: JSON, a CSV of rows, and the report; and back."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inferlab.benchmarks.load_report import load_report, sweep_report
from inferlab.benchmarks.modes_report import modes_report
from inferlab.benchmarks.peers_report import peers_report
from inferlab.benchmarks.quantization_report import matrix_plots, matrix_report
from inferlab.benchmarks.run_report import run_report
from inferlab.errors import UsageError
from inferlab.output import check_output, is_special, refuse_constant, write_json, write_text
from inferlab.reports.files import SUFFIXES, write_report
from inferlab.reports.model import Report
from inferlab.reports.picture import draw_plots

logger = logging.getLogger(__name__)

KINDS = ("runner_name", "engines", "batches", "pairs", "records", "loads")
"""A result has one of these: of one mode, of engines, of many modes, of formats, of a load, of a
sweep."""

WRITTEN = (".json", ".csv", *SUFFIXES)
"""What `write_outputs` puts behind PREFIX."""

CSV_COLUMNS = (
    "mode", "prompt_index", "iteration", "order", "latency_ms", "num_tokens", "tokens_per_second",
    "ms_per_token", "acceptance_rate", "mean_accepted_length", "target_forwards", "first_token_ms",
    "ttft_ms", "tpot_ms", "energy_j", "perplexity", "error",
)  # fmt: skip
BATCH_COLUMNS = ("batch_size", *(name for name in CSV_COLUMNS if name != "prompt_index"))


def output_stem(prefix: str | Path) -> str:
    """PREFIX, at which any of the endings may stand already."""
    stem = Path(prefix)
    return str(stem.with_suffix("") if stem.suffix in WRITTEN else stem)


def check_files(prefix: str, suffixes: Sequence[str]) -> list[Path]:
    """The files PREFIX + suffix of ``--output PREFIX``.

    Raises:
        UsageError: one of them cannot be written.
    """
    if is_special(prefix):
        *others, last = (f"PREFIX{suffix}" for suffix in suffixes)
        names = f"{', '.join(others)} and {last}"
        raise UsageError(f"--output: {prefix} is no file; {names} are written")
    check_output(prefix)
    paths = [Path(output_stem(prefix) + suffix) for suffix in suffixes]
    for path in paths:
        check_output(path)
    return paths


def write_outputs(prefix: str | Path, stats: Mapping[str, Any], rows: str | None = None) -> None:
    """Writes all of a result: as JSON first, then a CSV with a row per run, and the report.

    Args:
        rows: the CSV; None: that of its ``runs``.

    Raises:
        UsageError: a file cannot be written.
    """
    stem = output_stem(prefix)
    write_json(f"{stem}.json", stats)
    write_text(f"{stem}.csv", rows_csv(stats) if rows is None else rows)
    write_report(report_of(stats), stem)
    if "pairs" in stats:
        _draw(stats, Path(f"{stem}.png"))


def _draw(stats: Mapping[str, Any], path: Path) -> None:
    try:
        draw_plots(matrix_plots(stats), path)
    except ValueError as error:
        logger.warning("%s is left out: %s; the HTML file has the same plots", path, error)
    except OSError as error:
        raise UsageError(f"--output: {path} cannot be written: {error.strerror}") from None


def rows_csv(stats: Mapping[str, Any]) -> str:
    """A line per run; of batches without the indices of their prompts."""
    rows = stats.get("runs", [])
    columns = BATCH_COLUMNS if rows and "batch_size" in rows[0] else CSV_COLUMNS
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def report_of(stats: Mapping[str, Any]) -> Report:
    """The report of any result of `inferlab bench`.

    Raises:
        ValueError: it is none.
    """
    if "engines" in stats:
        return peers_report(stats)
    if "batches" in stats:
        return modes_report(stats)
    if "pairs" in stats:
        return matrix_report(stats)
    if "runner_name" in stats:
        return run_report(stats)
    if "loads" in stats:
        return sweep_report(stats)
    if "records" in stats:
        return load_report(stats)
    raise ValueError("this is no result of `inferlab bench`")


def read_result(path: str | Path) -> dict[str, Any]:
    """A result from its file.

    Raises:
        UsageError: it cannot be read, is no JSON, or no result of `inferlab bench` with its rows.
    """
    try:
        text = Path(path).read_text("utf-8")
        stats = json.loads(text, parse_constant=refuse_constant)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not JSON: {error}") from None
    if not isinstance(stats, dict) or not any(kind in stats for kind in KINDS):
        raise UsageError(f"{path}: is no result of `inferlab bench`; give a file of its --output")
    if not any(rows in stats for rows in ("runs", "records", "loads")):
        raise UsageError(f"{path}: has no `runs`, the raw rows; measure again with --output")
    return stats
