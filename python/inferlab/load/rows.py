"""What a load found as rows: a row per request."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from inferlab.load.metrics import in_load, queue_ms, tokens_per_chunk, tpot_ms
from inferlab.records import RequestRecord, record_of

CSV_COLUMNS = (
    "conversation", "turn", "category", "process", "scheduled_at", "sent_at", "queue_ms",
    "status_code", "attempts", "failure", "warnings", "error", "prompt_tokens", "num_tokens",
    "counted_by", "chunks", "tokens_per_chunk", "connect_ms", "ttft_ms", "ttft_content_ms",
    "tpot_ms", "e2e_ms", "finish_reason",
)  # fmt: skip


def load_csv(stats: Mapping[str, Any]) -> str:
    """A line per request; of a sweep with its ``level``."""
    table = io.StringIO(newline="")
    swept = "loads" in stats
    writer = csv.DictWriter(table, (("level",) if swept else ()) + CSV_COLUMNS)
    writer.writeheader()
    writer.writerows(_rows(stats))
    return table.getvalue()


def _rows(stats: Mapping[str, Any]) -> list[dict[str, Any]]:
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
