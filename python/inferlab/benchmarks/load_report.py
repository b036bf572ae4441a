"""The report of a load on a server, and of a sweep of loads, from their JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inferlab.benchmarks.run_report import environment_facts, short
from inferlab.benchmarks.sample_plots import sample_plots
from inferlab.benchmarks.samples import modes_in, samples_of
from inferlab.reports.model import Curves, Heading, Lines, Part, Report, Series, Table
from inferlab.reports.numbers import interval, number

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
COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
LEVELS = {
    "requests_per_s": "req/s",
    "output_tokens_per_s": "tokens/s",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "tpot_p50_ms": "TPOT p50, ms",
    "tpot_p99_ms": "TPOT p99, ms",
    "goodput_per_s": "goodput, 1/s",
}
CATEGORY = {
    "requests": "requests",
    "failed": "failed",
    "output_tokens": "output tokens",
    "ttft_ms": "TTFT, ms",
    "tpot_ms": "TPOT, ms",
    "e2e_ms": "E2E, ms",
    "tokens_per_chunk": "tokens per chunk",
}


def load_report(stats: Mapping[str, Any]) -> Report:
    """One load: counts, rates, distributions, categories, acceptance."""
    parts: list[Part] = [Lines(_sentences(stats))]
    if trouble := _trouble(stats):
        parts.append(Lines(trouble, alarm=True))
    if any(stats["distributions"].values()):
        parts.append(_distributions(stats))
    unknown = [
        f"not known, {TITLES.get(name, name)}: {why}"
        for name, why in stats["not_known"].items()
        if name != "connect_ms"
    ]
    if unknown:
        parts.append(Lines(unknown))
    if stats["categories"]:
        rows = [
            (name, *(_known(row[key]) for key in CATEGORY))
            for name, row in stats["categories"].items()
        ]
        parts.append(Table(("category", *CATEGORY.values()), rows, "records[], by exchange.load"))
    parts.append(Heading("Plots"))
    parts += sample_plots(modes_in(samples_of(stats)), "records[]", "records[]")
    parts += _acceptance(stats)
    return Report(f"load on {stats['server']}", _facts(stats), parts, _details(stats))


def sweep_report(stats: Mapping[str, Any]) -> Report:
    """Loads that grow: a row each, and latency against throughput."""
    name = "users" if stats["of"] == "concurrency" else "rate, 1/s"
    rows = [
        (
            f"{row['level']:g}",
            *(_known(row[key]) for key in LEVELS),
            "" if row["gain"] is None else f"{row['gain']:+.1%}",
            str(row["failed"]),
        )
        for row in stats["levels"]
    ]
    parts: list[Part] = []
    trouble = [
        f"{name} {level['level']:g}: {line}"
        for level, load in zip(stats["levels"], stats["loads"], strict=True)
        for line in _trouble(load)
    ]
    if trouble:
        parts.append(Lines(trouble, alarm=True))
    parts += [
        Table((name, *LEVELS.values(), "gain", "failed"), rows, "loads[].records[]"),
        Lines([f"ended: {stats['stopped']}"]),
        *_curves(stats),
        *sample_plots(modes_in(samples_of(stats)), "loads[].records[]", "loads[].records[]"),
    ]
    first = stats["loads"][0]
    title = f"sweep of {stats['of']} on {first['server']}"
    return Report(title, _facts(first), parts, _details(first))


def _trouble(stats: Mapping[str, Any]) -> list[str]:
    lines = ["interrupted: these are partial results"] if stats["interrupted"] else []
    lines += [
        f"failed, {name}: {count}; the first: {stats['first_errors'].get(name, '')}"
        for name, count in stats["failures"].items()
        if name != "interrupted"  # they are counted above
    ]
    return lines + [
        f"warning: {name}: {count} answers" for name, count in stats["warnings"].items()
    ]


def _facts(stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    asked = {"model": stats["model"], "endpoint": stats["endpoint"], "proxy": stats["proxy"]}
    return [(key, short(value)) for key, value in asked.items() if value]


def _details(stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All settings, machine and versions."""
    facts = []
    for key, value in stats["settings"].items():
        if isinstance(value, Mapping):
            value = {name: item for name, item in value.items() if item is not None}
        if value is not None and value != {}:
            facts.append((key.replace("_", " "), short(value)))
    return facts + environment_facts(stats)


def _sentences(stats: Mapping[str, Any]) -> list[str]:
    """What was asked for and what came of it."""
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
        f"arrivals: {', '.join(parts)}",
        f"requests: {requests['sent']} sent, {requests['succeeded']} answered, "
        f"{requests['failed']} failed, {requests['interrupted']} interrupted, "
        f"{requests['retries']} tries again, in {passed['duration_s']:.3f} s",
        f"throughput: {_known(passed['requests_per_s'])} requests/s, "
        f"{_known(passed['output_tokens_per_s'])} output tokens/s, "
        f"{_known(passed['input_tokens_per_s'])} input tokens/s",
        f"peak of a second: {_known(passed['peak_requests_per_s'])} requests, "
        f"{_known(passed['peak_chunks_per_s'])} chunks, "
        f"{_known(passed['peak_output_tokens_per_s'])} output tokens",
    ]
    if kind != "closed":
        lines.append(
            f"rate: asked {_asked(stats)}/s, scheduled "
            f"{_known(rates['scheduled_per_s'])}/s, sent {_known(rates['sent_per_s'])}/s"
        )
    if (goodput := stats["goodput"]) is not None:
        bounds = ", ".join(f"{name} {value:g} ms" for name, value in goodput["slos_ms"].items())
        lines.append(
            f"goodput ({bounds}): {_known(goodput['requests_per_s'])} requests/s, "
            f"{goodput['share'] * 100:.1f} % of all; not known of {goodput['not_known']}"
        )
    queue, lag = stats["queue_ms"], client["loop_lag_ms"]
    shares = ", ".join(f"{share * 100:.0f} %" for share in client["cpu_share"])
    lines.append(f"client: queue {_two(queue)}, event-loop lag {_two(lag)}, processor {shares}")
    for name, words in (("of_server", "by /metrics"), ("of_answers", "by the answers")):
        found = stats["acceptance"][name]
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


def _drafts(found: Mapping[str, Any]) -> str:
    parts = [
        f"{_count(found['accepted_tokens'])} of {_count(found['drafted_tokens'])} tokens accepted",
        f"length {_known(found['length'])}, with the bonus token "
        f"{_known(found['length_with_bonus'])}",
    ]
    if found["accepted_at"]:
        parts.append("by position " + " ".join(map(str, found["accepted_at"])))
    return "; ".join(parts + ([found["note"]] if found["note"] else []))


def _two(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not known"
    return f"{found['p50']:.2f} ms (p99 {found['p99']:.2f})"


def _distributions(stats: Mapping[str, Any]) -> Table:
    rows = []
    for name, title in TITLES.items():
        if (found := stats["distributions"].get(name)) is not None:
            cells = [number(found[key]) for key in COLUMNS]
            bounds = interval(found["p50_ci95"]), interval(found["p99_ci95"])
            rows.append((title, *cells, *bounds, str(found["count"])))
    return Table(("", *COLUMNS, "95 % of p50", "of p99", "n"), rows, "records[]")


def _curves(stats: Mapping[str, Any]) -> list[Curves]:
    """Latencies against the throughput that each level came to."""
    levels = stats["levels"]
    told = all(level["output_tokens_per_s"] is not None for level in levels)
    key, name = ("output_tokens_per_s", "output tokens per second")
    if not told:
        key, name = "requests_per_s", "requests per second"
    curves = []
    for of, title in (("ttft", "TTFT"), ("tpot", "TPOT")):
        series = [
            Series(quantile, _points(levels, key, f"{of}_{quantile}_ms"))
            for quantile in ("p50", "p99")
        ]
        series = [one for one in series if one.points]
        if series:
            curves.append(
                Curves(f"{title} against throughput", name, f"{title}, ms", series,
                       "loads[].records[], quantiles by level")
            )  # fmt: skip
    return curves


def _points(levels: Sequence[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    return [(row[x], row[y]) for row in levels if row[x] is not None and row[y] is not None]


def _acceptance(stats: Mapping[str, Any]) -> list[Curves]:
    """As the server counts: accepted tokens at each position over drafts."""
    names = {"of_server": "by /metrics", "of_answers": "by the answers"}
    series = []
    for key, name in names.items():
        found = stats["acceptance"][key]
        if found is not None and found["accepted_at"] and found["drafts"]:
            rates = [accepted / found["drafts"] for accepted in found["accepted_at"]]
            points = [(float(place), rate) for place, rate in enumerate(rates, 1)]
            series.append(Series(name, points))
    if not series:
        return []
    return [
        Curves("Acceptance by position, told by the server", "position in the draft", "accepted",
               series, "acceptance, accepted_at over drafts", share=True)
    ]  # fmt: skip


def _count(value: int | None) -> str:
    return "not known" if value is None else str(value)


def _asked(stats: Mapping[str, Any]) -> str:
    """The rate, or the first and the last of a ramp."""
    arrivals = stats["settings"]["arrivals"]
    if arrivals["rate_end"] is not None:
        return f"{number(arrivals['rate'])} to {number(arrivals['rate_end'])}"
    return _known(stats["rates"]["asked_per_s"])


def _known(value: float | None) -> str:
    return "not known" if value is None else number(value)
