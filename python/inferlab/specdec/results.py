"""A finished request as the mapping that `SpeculativePipeline.generate` returns."""

from __future__ import annotations

import os
import resource
import sys
from typing import Any

from inferlab.types import GenerationResult


def result_mapping(result: GenerationResult) -> dict[str, Any]:
    """Text, tokens, times and counts of one request; see `SpeculativePipeline.generate`."""
    stats = result.stats
    count = len(result.token_ids)
    per_second = count / (result.latency_ms / 1e3) if result.latency_ms > 0 else 0.0
    timings = {phase: round(ms, 4) for phase, ms in result.timings_ms.items()}
    mapping: dict[str, Any] = {
        "text": result.text,
        "token_ids": result.token_ids,
        "generated_tokens": result.token_ids,
        "num_tokens": count,
        "finish_reason": result.finish_reason,
        "latency_ms": result.latency_ms,
        "first_token_ms": result.first_token_ms,
        "tokens_per_second": per_second,
        "tokens_per_sec": per_second,
        "acceptance_rate": stats.acceptance_rate,
        "mean_accepted_length": stats.mean_accepted_length,
        "acceptance_by_position": stats.acceptance_by_position,
        "offered_by_position": list(stats.offered_at),
        "proposed": stats.proposed,
        "accepted": stats.accepted,
        "steps": stats.steps,
        "target_forwards": stats.target_forwards,
        "timings_ms": timings,
        "verification_time_ms": timings.get("verify", 0.0) + timings.get("accept", 0.0),
        "generation_time_ms": timings.get("draft", 0.0),
        "mem_rss_mb": _rss_mb(),
    }
    if result.error is not None:
        mapping["error"] = result.error
    return mapping


def _rss_mb() -> float:
    """Resident memory of this process in MB."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
