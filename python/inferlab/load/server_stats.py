"""What a server's ``/metrics`` tells: how drafts fared, how much it does, how full its cache is.

Drafts are told of by counters, whose growth between two scrapes is that of the requests between:

- vLLM: ``vllm:spec_decode_num_drafts_total``, ``_num_draft_tokens_total``,
  ``_num_accepted_tokens_total``, ``_num_accepted_tokens_per_pos_total{position=}``
  (vllm/v1/spec_decode/metrics.py); this package's server has the same;
- llama.cpp's server: the same with ``llamacpp:`` in front (tools/server/README.md);
- SGLang: the counter ``sglang:spec_verify_calls_total``, and two gauges of the latest interval of
  its log, ``sglang:spec_accept_length`` (bonus included) and ``sglang:spec_accept_rate``
  (python/sglang/srt/observability/metrics_collector.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from inferlab.errors import UsageError
from inferlab.load.acceptance import Acceptance, whole_number


class Series(NamedTuple):
    """One value of a metric."""

    labels: Mapping[str, str]
    value: float


Scrape = Mapping[str, Sequence[Series]]
"""What ``/metrics`` told at one time, by name."""

_MODEL = "model_name"
_RATE_OF_SGLANG = (
    "SGLang's /metrics tells rate and length of its latest interval alone, not of the whole run; "
    "its answers tell more, where return_meta_info or return_spec_tokens_details asks for it"
)


def parse_metrics(text: str) -> Scrape:
    """Reads Prometheus' text format.

    Raises:
        UsageError: prometheus-client is not installed.
        ValueError: it is another format.
    """
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        raise UsageError(
            "reading a server's /metrics needs prometheus-client: "
            "pip install 'llm-inference-lab[load]'"
        ) from None
    found: dict[str, list[Series]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, []).append(Series(sample.labels, sample.value))
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"is not Prometheus' text format: {error}") from None
    return found


def acceptance_between(
    before: Scrape, after: Scrape, model: str | None = None
) -> Acceptance | None:
    """How the drafts of all requests between two scrapes fared.

    Engines of one server are added up. Where the server was restarted in between, or tells of
    several models none of which is ``model``, nothing is known, and the note says why.

    Args:
        model: whose drafts are meant, where a server has several models.

    Returns:
        None: the server tells nothing of drafts.
    """
    source = _source_of(after)
    if source is None:
        return None
    try:
        if source == "sglang":
            return _of_gauges(before, after, model)
        prefix = "llamacpp:" if source == "llama.cpp" else "vllm:"
        return _of_counters(before, after, model, prefix, source)
    except _Unknown as why:
        return Acceptance(source=source, note=str(why))


class _Unknown(Exception):
    """Why something cannot be told."""


def _source_of(scrape: Scrape) -> str | None:
    """Whose names a scrape has, for drafts."""
    if "vllm:spec_decode_num_draft_tokens_total" in scrape:
        return "inferlab" if "inferlab:steps_total" in scrape else "vllm"
    if "llamacpp:spec_decode_num_draft_tokens_total" in scrape:
        return "llama.cpp"
    return "sglang" if "sglang:spec_accept_length" in scrape else None


def _of_counters(
    before: Scrape, after: Scrape, model: str | None, prefix: str, source: str
) -> Acceptance:
    growth = _Growth(before, after, model)
    name = f"{prefix}spec_decode_num_"
    accepted = growth.of(f"{name}accepted_tokens")
    by_position = growth.by_label(f"{name}accepted_tokens_per_pos", "position")
    # A position has no value yet where nothing was drafted there.
    accepted_at: list[int] | None = [] if accepted == 0 else None
    if by_position is not None and all(position.isdecimal() for position in by_position):
        places = {int(position): count for position, count in by_position.items()}
        accepted_at = [places.get(i, 0) for i in range(max(places, default=-1) + 1)]
    return Acceptance.of_counts(
        source,
        growth.of(f"{name}drafts"),
        growth.of(f"{name}draft_tokens"),
        accepted,
        accepted_at,
    )


def _of_gauges(before: Scrape, after: Scrape, model: str | None) -> Acceptance | None:
    """SGLang's, whose counter tells of steps alone."""
    drafts = _Growth(before, after, model).of("sglang:spec_verify_calls")
    rates, lengths = (
        {series.value for series in _of_model(after, f"sglang:spec_accept_{what}", model)}
        for what in ("rate", "length")
    )
    if not drafts and not any(lengths):
        return None  # it does not draft: the gauges are there all the same
    if len(rates) > 1 or len(lengths) > 1:
        note = "its engines tell different rates, which cannot be averaged without their counts"
        return Acceptance(source="sglang", drafts=drafts, note=note)
    length = next(iter(lengths), None)
    return Acceptance(
        source="sglang",
        drafts=drafts,
        rate=next(iter(rates), None),
        length=None if length is None else length - 1,
        length_with_bonus=length,
        note=_RATE_OF_SGLANG,
    )


class _Growth:
    """By how much counters grew between two scrapes."""

    def __init__(self, before: Scrape, after: Scrape, model: str | None) -> None:
        self._before = before
        self._after = after
        self._model = model
        self._check_start("process_start_time_seconds")

    def of(self, name: str) -> int | None:
        """The growth of a counter, over all labels; None: there is no such counter."""
        grown = self.by_label(name, None)
        return None if grown is None else sum(grown.values())

    def by_label(self, name: str, label: str | None) -> dict[str, int] | None:
        """The growth by the values of one label."""
        if f"{name}_total" not in self._after:
            return None
        self._check_start(f"{name}_created")
        old, new = (
            {
                frozenset(s.labels.items()): s
                for s in _of_model(scrape, f"{name}_total", self._model)
            }
            for scrape in (self._before, self._after)
        )
        if lost := old.keys() - new.keys():
            labels = dict(sorted(min(lost, key=str)))
            raise _Unknown(f"the server was restarted meanwhile: {name} lost its value of {labels}")
        grown: dict[str, int] = {}
        for key, series in new.items():
            start = old[key].value if key in old else 0.0
            count = whole_number(series.value - start)
            if series.value < start:
                raise _Unknown(
                    f"the server was restarted meanwhile: {name} fell from {start:g} to "
                    f"{series.value:g}"
                )
            if count is None:
                raise _Unknown(f"{name} is {series.value}, which is no count")
            value = series.labels.get(label, "") if label else ""
            grown[value] = grown.get(value, 0) + count
        return grown

    def _check_start(self, name: str) -> None:
        """Compares when things began: a restarted server may have counted past the old figures."""
        old, new = (
            {frozenset(s.labels.items()): s.value for s in scrape.get(name, ())}
            for scrape in (self._before, self._after)
        )
        if any(new[key] != old[key] for key in old.keys() & new.keys()):
            raise _Unknown(f"the server was restarted meanwhile: {name} changed")


def _of_model(scrape: Scrape, name: str, model: str | None) -> list[Series]:
    """The values of one model; those without a model's name are everybody's."""
    found = list(scrape.get(name, ()))
    names = sorted({s.labels[_MODEL] for s in found if _MODEL in s.labels})
    if len(names) < 2:
        return found
    if model not in names:
        raise _Unknown(f"the server tells of several models, {', '.join(names)}; name one of them")
    return [s for s in found if s.labels.get(_MODEL, model) == model]


@dataclass(frozen=True)
class ServerLoad:
    """What a server is doing at the time of a scrape; None: it does not tell.

    Attributes:
        running: requests in the batch, of all engines.
        waiting: requests in the queue, of all engines.
        cache_usage: the share of the K/V cache in use, in [0, 1]; that of the fullest engine.
    """

    running: int | None
    waiting: int | None
    cache_usage: float | None


_RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing")
_WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred")
_CACHE = (
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "sglang:token_usage",
    "llamacpp:kv_cache_usage_ratio",
)


def server_load(scrape: Scrape) -> ServerLoad:
    """What a scrape tells of the moment."""

    def values(names: Iterable[str]) -> list[float]:
        found = next((scrape[name] for name in names if name in scrape), ())
        return [series.value for series in found if math.isfinite(series.value)]

    running, waiting, cache = values(_RUNNING), values(_WAITING), values(_CACHE)
    return ServerLoad(
        running=round(sum(running)) if running else None,
        waiting=round(sum(waiting)) if waiting else None,
        cache_usage=max(cache, default=None),
    )
