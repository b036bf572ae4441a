"""The raw rows of a result's JSON, in one form: what reports plot and comparisons compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inferlab.benchmarks.measure import record_figures, speculation_figures
from inferlab.records import RequestRecord, record_of, total_stats

TIMES = {
    "latency_ms": "latency, ms",
    "ttft_ms": "TTFT, ms",
    "first_token_ms": "first token, ms",
    "tpot_ms": "TPOT, ms",
    "ms_per_token": "ms per token",
}
"""Figures of a run that are times -> their names."""


@dataclass(frozen=True)
class Sample:
    """One run.

    Attributes:
        mode: who decoded; of a table over batch sizes "batch 4, ngram".
        prompts: indices of what was decoded together, most often of one.
        figures: name -> value: ``latency_ms``, ``tokens_per_second`` and so on.
        records: of its requests, where the JSON has them; those that failed are not among them.
        error: why it failed.
    """

    mode: str
    prompts: tuple[int, ...]
    iteration: int
    figures: Mapping[str, float]
    records: Sequence[RequestRecord] = field(default=())
    error: str | None = None


def samples_of(stats: Mapping[str, Any]) -> list[Sample]:
    """All runs of a result of `inferlab bench`, in the order in which they were made."""
    if loads := loads_in(stats):
        prompts = {text: place for place, text in enumerate(prompts_of(stats))}
        return [s for name, records in loads.items() for s in _of_records(name, records, prompts)]
    if "batches" in stats or "pairs" in stats:
        several = len(stats.get("batches", ())) > 1
        return [_of_batch(row, several) for row in stats["runs"]]
    return list(_of_runs(stats))


def prompts_of(stats: Mapping[str, Any]) -> list[str]:
    """The prompts that samples name by their place, in order."""
    if loads := loads_in(stats):
        return list(dict.fromkeys(_prompt(entry) for of in loads.values() for entry in of))
    return list(stats["prompts"])


def loads_in(stats: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The records of a load on a server, or of each load of a sweep; empty for other results."""
    if "loads" in stats:
        pairs = zip(stats["levels"], stats["loads"], strict=True)
        return {f"{stats['of']} {level['level']:g}": load["records"] for level, load in pairs}
    return {"http": stats["records"]} if "records" in stats else {}


def modes_in(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Mode -> its runs that succeeded."""
    modes: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.error is None:
            modes.setdefault(sample.mode, []).append(sample)
    return modes


def _of_runs(stats: Mapping[str, Any]) -> Iterator[Sample]:
    rows = stats["runs"]
    others = stats.get("baseline_comparison", {}).get("records", ())
    kept = {(one["mode"], one["prompt_index"], one["iteration"]): one for one in others}
    for one in stats.get("raw_results", ()):
        kept[rows[0]["mode"], one["prompt_index"], one["iteration"]] = one
    for row in rows:
        key = (row["mode"], row["prompt_index"], row["iteration"])
        records = [record_of(kept[key])] if key in kept else []
        yield Sample(key[0], (key[1],), key[2], _figures(row), records, row.get("error"))


def _of_batch(row: Mapping[str, Any], several: bool) -> Sample:
    mode = f"batch {row['batch_size']}, {row['mode']}" if several else row["mode"]
    records = [record_of({"record": record}) for record in row.get("records", ())]
    figures = {**_figures(row), **speculation_figures(total_stats(records))}
    prompts = tuple(row["prompt_indices"])
    return Sample(mode, prompts, row["iteration"], figures, records, row.get("error"))


def _of_records(
    mode: str, records: Iterable[Mapping[str, Any]], prompts: Mapping[str, int]
) -> Iterator[Sample]:
    """Requests of a load; the n-th of a prompt is its n-th iteration."""
    seen: dict[int, int] = {}
    for entry in records:
        record = record_of({"record": entry})
        prompt = prompts[_prompt(entry)]
        iteration = seen[prompt] = seen.get(prompt, -1) + 1
        figures = {} if record.error is not None else record_figures(record)
        yield Sample(mode, (prompt,), iteration, figures, [record], record.error)


def _prompt(record: Mapping[str, Any]) -> str:
    return record.get("prompt") or ""


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    known = (*TIMES, "tokens_per_second", "num_tokens", "acceptance_rate", "mean_accepted_length")
    return {key: row[key] for key in known if row.get(key) is not None}
