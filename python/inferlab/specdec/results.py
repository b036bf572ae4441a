"""A finished request as a record, and as what `SpeculativePipeline.generate` returns."""

from __future__ import annotations

import time
from typing import Any

from typing_extensions import NotRequired, TypedDict

from inferlab.machine import resident_mb
from inferlab.records import RecordJson, RequestRecord, Speculation
from inferlab.types import GenerationResult, SamplingParams, SpeculationStats


class SpecdecResult(TypedDict):
    """See `SpeculativePipeline.generate`."""

    text: str
    token_ids: list[int]
    generated_tokens: list[int]
    num_tokens: int
    finish_reason: str
    latency_ms: float
    first_token_ms: float
    tokens_per_second: float
    tokens_per_sec: float
    acceptance_rate: float
    mean_accepted_length: float
    acceptance_by_position: list[float]
    offered_by_position: list[int]
    proposed: int
    accepted: int
    steps: int
    target_forwards: int
    timings_ms: dict[str, float]
    verification_time_ms: float
    generation_time_ms: float
    mem_rss_mb: float
    policy: dict[str, Any]
    controller: dict[str, Any]
    lossless: bool
    impl: str
    device: str
    dtype: str
    base_model: str
    draft_model: str | None
    draft_mode: str
    seed: int
    record: RecordJson
    error: NotRequired[str]


def request_record(
    result: GenerationResult,
    params: SamplingParams,
    speculation: Speculation,
    **about: Any,
) -> RequestRecord:
    """The record of a request that has just ended.

    Args:
        about: its other fields: of prompt, model, device and dtype.
    """
    return RequestRecord(
        source="specdec",
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        seed=params.seed,
        text=result.text,
        token_ids=result.token_ids,
        num_tokens=len(result.token_ids),
        counted_by="ids",
        finish_reason=result.finish_reason,
        error=result.error,
        started_at=time.time() - result.latency_ms / 1e3,
        latency_ms=result.latency_ms,
        first_token_ms=result.first_token_ms,
        timings_ms={phase: round(ms, 4) for phase, ms in result.timings_ms.items()},
        rss_mb=resident_mb(),
        speculation=speculation,
        **about,
    )


def result_mapping(record: RequestRecord) -> SpecdecResult:
    """The record under the names that users know; see `SpeculativePipeline.generate`."""
    r: Any = record  # the engine fills the fields that may be None
    stats: SpeculationStats = r.speculation.stats
    mapping: SpecdecResult = {
        "text": r.text,
        "token_ids": r.token_ids,
        "generated_tokens": r.token_ids,
        "num_tokens": r.num_tokens,
        "finish_reason": r.finish_reason,
        "latency_ms": r.latency_ms,
        "first_token_ms": r.first_token_ms,
        "tokens_per_second": r.tokens_per_second,
        "tokens_per_sec": r.tokens_per_second,
        "acceptance_rate": stats.acceptance_rate,
        "mean_accepted_length": stats.mean_accepted_length,
        "acceptance_by_position": stats.acceptance_by_position,
        "offered_by_position": list(stats.offered_at),
        "proposed": stats.proposed,
        "accepted": stats.accepted,
        "steps": stats.steps,
        "target_forwards": stats.target_forwards,
        "timings_ms": r.timings_ms,
        "verification_time_ms": r.timings_ms.get("verify", 0.0) + r.timings_ms.get("accept", 0.0),
        "generation_time_ms": r.timings_ms.get("draft", 0.0),
        "mem_rss_mb": r.rss_mb,
        "policy": r.speculation.policy,
        "controller": r.speculation.controller,
        "lossless": r.speculation.lossless,
        "impl": r.speculation.impl,
        "device": r.device,
        "dtype": r.dtype,
        "base_model": r.model,
        "draft_model": r.speculation.draft_model,
        "draft_mode": r.speculation.draft_mode,
        "seed": r.seed,
        "record": record.as_json(),
    }
    if record.error is not None:
        mapping["error"] = record.error
    return mapping
