"""A load of a sweep as a row. Needs nothing that asks servers."""

from __future__ import annotations

from typing import Literal

from inferlab.load.outputs import Distribution, LoadStats, SweepLevel


def level_of(level: float, stats: LoadStats, best: float | None) -> SweepLevel:
    """A load as a row.

    Args:
        best: tokens per second of the best level before; None: it is the first.
    """
    throughput, goodput = stats["throughput"], stats["goodput"]
    ttft, tpot = (stats["distributions"].get(name) for name in ("ttft_ms", "tpot_ms"))
    row: SweepLevel = {
        "level": level,
        "requests_per_s": throughput["requests_per_s"],
        "output_tokens_per_s": throughput["output_tokens_per_s"],
        "gain": None,
        "ttft_p50_ms": _of(ttft, "p50"),
        "ttft_p99_ms": _of(ttft, "p99"),
        "tpot_p50_ms": _of(tpot, "p50"),
        "tpot_p99_ms": _of(tpot, "p99"),
        "goodput_per_s": None if goodput is None else goodput["requests_per_s"],
        "failed": stats["requests"]["failed"],
    }
    if best:
        row["gain"] = gauge(row) / best - 1
    return row


def gauge(row: SweepLevel) -> float:
    """What a level gives: output tokens per second, or requests where tokens are not known."""
    tokens = row["output_tokens_per_s"]
    return row["requests_per_s"] if tokens is None else tokens


def _of(found: Distribution | None, key: Literal["p50", "p99"]) -> float | None:
    return None if found is None else found[key]
