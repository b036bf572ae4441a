"""What a load found: tables for people, rows for CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from inferlab.load.metrics import in_load, queue_ms, tokens_per_chunk, tpot_ms
from inferlab.load.outputs import Distribution, LoadStats, SweepLevel, SweepStats
from inferlab.output import write_json, write_text
from inferlab.records import RequestRecord, record_of

TITLES = {
    "ttft_ms": "TTFT, ms",
    "ttft_content_ms": "TTFT (content), ms",
    "tpot_ms": "TPOT, ms",
    "itl_ms": "ITL by token, ms",
    "icl_ms": "ICL by chunk, ms",
    "tokens_per_chunk": "tokens per chunk",
    "e2e_ms": "E2E, ms",
    "connect_ms": "connect, ms",
}
CSV_COLUMNS = (
    "conversation", "turn", "category", "process", "scheduled_at", "sent_at", "queue_ms",
    "status_code", "attempts", "failure", "warnings", "error", "prompt_tokens", "num_tokens",
    "counted_by", "chunks", "tokens_per_chunk", "connect_ms", "ttft_ms", "ttft_content_ms",
    "tpot_ms", "e2e_ms", "finish_reason",
)  # fmt: skip


def write_load(paths: tuple[Path, Path], stats: LoadStats | SweepStats) -> None:
    """Writes all of it as JSON, and a row per request as CSV (of a sweep with its ``level``).

    Raises:
        UsageError: a file cannot be written.
    """
    write_json(paths[0], stats)
    table = io.StringIO(newline="")
    swept = "loads" in stats
    writer = csv.DictWriter(table, (("level",) if swept else ()) + CSV_COLUMNS)
    writer.writeheader()
    writer.writerows(_rows(stats))
    write_text(paths[1], table.getvalue())


def _rows(stats: Any) -> list[dict[str, Any]]:
    if "loads" not in stats:
        return [csv_row(record_of({"record": record})) for record in stats["records"]]
    return [
        {"level": level["level"], **row}
        for level, load in zip(stats["levels"], stats["loads"], strict=True)
        for row in _rows(load)
    ]


def csv_row(record: RequestRecord) -> dict[str, Any]:
    """A request, flat."""
    load = in_load(record)
    exchange = record.exchange
    assert exchange is not None
    return {
        "conversation": load.conversation,
        "turn": load.turn,
        "category": load.category,
        "process": load.process,
        "scheduled_at": load.scheduled_at,
        "sent_at": load.sent_at,
        "queue_ms": queue_ms(record),
        "status_code": exchange.status_code,
        "attempts": exchange.attempts,
        "failure": load.failure,
        "warnings": " ".join(load.warnings),
        "error": record.error,
        "prompt_tokens": record.prompt_tokens,
        "num_tokens": record.num_tokens,
        "counted_by": record.counted_by,
        "chunks": len(record.text_times_ms),
        "tokens_per_chunk": tokens_per_chunk(record),
        "connect_ms": load.connect_ms,
        "ttft_ms": record.first_token_ms,
        "ttft_content_ms": load.first_content_ms,
        "tpot_ms": tpot_ms(record),
        "e2e_ms": record.latency_ms,
        "finish_reason": record.finish_reason,
    }


def print_load(stats: LoadStats, console: Console | None = None) -> None:
    """Prints a load as tables."""
    console = console or _console()
    console.print(f"load on {stats['server']}", style="bold")
    for line in _lines(stats):
        console.print(line, markup=False, soft_wrap=True)
    if stats["interrupted"]:
        console.print("interrupted: these are partial results", style="bold")
    for name, count in stats["failures"].items():
        if name != "interrupted":
            _line(console, f"failed, {name}", f"{count}; the first: {stats['first_errors'][name]}")
    for name, count in stats["warnings"].items():
        _line(console, "warning", f"{name}: {count} answers")
    if any(stats["distributions"].values()):
        console.print(_distributions(stats))
    for name, reason in stats["not_known"].items():
        if name != "connect_ms":
            _line(console, f"not known, {TITLES.get(name, name)}", reason)
    if stats["categories"]:
        console.print(_categories(stats))


def print_sweep(stats: SweepStats, console: Console | None = None) -> None:
    """Prints the levels of a sweep, a row each."""
    console = console or _console()
    name = "users" if stats["of"] == "concurrency" else "rate, 1/s"
    table = _table(
        name, "req/s", "tokens/s", "gain", "TTFT p50", "p99, ms", "TPOT p50", "p99, ms",
        "goodput, 1/s", "failed",
    )  # fmt: skip
    for row in stats["levels"]:
        table.add_row(*level_cells(row))
    console.print(f"sweep of {stats['of']} on {stats['loads'][0]['server']}", style="bold")
    console.print(table)
    _line(console, "ended", stats["stopped"])
    for load in stats["loads"]:
        for failure, count in load["failures"].items():
            why = load["first_errors"][failure]
            _line(console, f"failed, {failure}", f"{count}; the first: {why}")


def level_cells(row: SweepLevel) -> list[str]:
    """A level as the cells of its row."""
    gain = row["gain"]
    return [
        f"{row['level']:g}",
        _number(row["requests_per_s"]),
        _number(row["output_tokens_per_s"]),
        "-" if gain is None else f"{gain * 100:+.1f} %",
        *(
            _number(row[key])  # type: ignore[literal-required]
            for key in ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "goodput_per_s")
        ),
        str(row["failed"]),
    ]


def _lines(stats: LoadStats) -> list[str]:
    """The load in sentences."""
    asked, requests, passed = stats["settings"], stats["requests"], stats["throughput"]
    arrivals, rates, client = asked["arrivals"], stats["rates"], stats["client"]
    kind = arrivals["kind"]
    parts = [kind]
    if kind == "closed":
        parts.append(f"{asked['concurrency']} users")
    elif kind == "ramp":
        parts.append(f"{arrivals['rate']:g} to {arrivals['rate_end']:g}/s")
    elif arrivals["rate"] is not None:
        parts.append(f"{arrivals['rate']:g}/s")
    if asked["processes"] > 1:
        parts.append(f"{asked['processes']} processes")
    lines = [
        f"model: {stats['model']}, endpoint {stats['endpoint']}"
        + (f", by the proxy of {stats['proxy']}" if stats["proxy"] else ""),
        f"arrivals: {', '.join(parts)}",
        f"requests: {requests['sent']} sent, {requests['succeeded']} answered, "
        f"{requests['failed']} failed, {requests['interrupted']} interrupted, "
        f"{requests['retries']} tries again, in {passed['duration_s']:.3f} s",
        f"throughput: {_number(passed['requests_per_s'])} requests/s, "
        f"{_number(passed['output_tokens_per_s'])} output tokens/s, "
        f"{_number(passed['input_tokens_per_s'])} input tokens/s",
        f"peak of a second: {_number(passed['peak_requests_per_s'])} requests, "
        f"{_number(passed['peak_chunks_per_s'])} chunks, "
        f"{_number(passed['peak_output_tokens_per_s'])} output tokens",
    ]
    if kind != "closed":
        lines.append(
            f"rate: asked {_number(rates['asked_per_s'])}/s, scheduled "
            f"{_number(rates['scheduled_per_s'])}/s, sent {_number(rates['sent_per_s'])}/s"
        )
    if (goodput := stats["goodput"]) is not None:
        bounds = ", ".join(f"{name} {value:g} ms" for name, value in goodput["slos_ms"].items())
        lines.append(
            f"goodput ({bounds}): {_number(goodput['requests_per_s'])} requests/s, "
            f"{goodput['share'] * 100:.1f} % of all; not known of {goodput['not_known']}"
        )
    queue, lag = stats["queue_ms"], client["loop_lag_ms"]
    shares = ", ".join(f"{share * 100:.0f} %" for share in client["cpu_share"])
    lines.append(f"client: queue {_two(queue)}, event-loop lag {_two(lag)}, processor {shares}")
    for name, words in (("of_server", "by /metrics"), ("of_answers", "by the answers")):
        found = stats["acceptance"][name]  # type: ignore[literal-required]
        if found is not None and (found["drafted_tokens"] or found["note"]):
            lines.append(f"drafts, {words}: {_drafts(found)}")
    if (again := stats["recount"]) is not None:
        lines.append(
            f"tokens again by {again['tokenizer']}: {again['by_tokenizer']} where usage says "
            f"{again['by_usage']}; {again['differing']} of {again['requests']} answers differ, by "
            f"{again['largest_difference']} at most; {again['not_compared']} not compared"
        )
        if again["prompts"]:
            lines.append(
                f"of {again['prompts']} prompts: {again['prompts_by_tokenizer']} where usage says "
                f"{again['prompts_by_usage']}"
            )
    return lines


def _drafts(found: dict[str, Any]) -> str:
    parts = [
        f"{found['accepted_tokens']} of {found['drafted_tokens']} tokens accepted",
        f"length {_number(found['length'])}, with the bonus token "
        f"{_number(found['length_with_bonus'])}",
    ]
    if found["accepted_at"]:
        parts.append("by position " + " ".join(map(str, found["accepted_at"])))
    return "; ".join(parts + ([found["note"]] if found["note"] else []))


def _two(found: Distribution | None) -> str:
    if found is None:
        return "not known"
    return f"{found['p50']:.2f} ms (p99 {found['p99']:.2f})"


def _distributions(stats: LoadStats) -> Table:
    columns = ("mean", "p50", "p90", "p95", "p99", "max")
    table = _table("", *columns, "95 % of p50", "of p99", "n")
    for name, title in TITLES.items():
        found: Any = stats["distributions"].get(name)
        if found is None:
            if name in stats["not_known"]:
                table.add_row(title, *["not known"], *[""] * (len(columns) + 2))
            continue
        table.add_row(
            title,
            *(_number(found[key]) for key in columns),
            _interval(found["p50_ci95"]),
            _interval(found["p99_ci95"]),
            str(found["count"]),
        )
    return table


def _categories(stats: LoadStats) -> Table:
    table = _table(
        "category", "requests", "failed", "output tokens", "TTFT", "TPOT", "E2E, ms",
        "tokens per chunk",
    )  # fmt: skip
    for name, row in stats["categories"].items():
        tokens = row["output_tokens"]
        table.add_row(
            name, str(row["requests"]), str(row["failed"]), "-" if tokens is None else str(tokens),
            *(_number(row[key])  # type: ignore[literal-required]
              for key in ("ttft_ms", "tpot_ms", "e2e_ms", "tokens_per_chunk")),
        )  # fmt: skip
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _console() -> Console:
    """Stdout, wide enough for the tables where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def _line(console: Console, name: str, text: str) -> None:
    console.print(f"{name}: {text}", markup=False, soft_wrap=True)


def _number(value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def _interval(interval: Sequence[float] | None) -> str:
    if interval is None:
        return "-"
    return f"{_number(interval[0])} to {_number(interval[1])}"
