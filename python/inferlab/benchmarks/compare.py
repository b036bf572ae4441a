"""Two results side by side: is the second faster or slower, does it accept less, says it the same?

The runs of two results are not of one time, so only prompts are pairs: differences are judged by
dealing a prompt's runs anew, all metrics of a comparison together (Holm). What a drift of the
machine between the two did to all prompts looks like a difference; so where both also measured
Hugging Face's `generate` in turns, speeds are judged by how many times its speed they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal

from typing_extensions import TypedDict

from inferlab.benchmarks.comparison import first_difference
from inferlab.benchmarks.outputs import Interval
from inferlab.benchmarks.run_report import SETTINGS, short
from inferlab.benchmarks.samples import TIMES, Sample, prompts_of, samples_of
from inferlab.benchmarks.statistics import holm, permutation_p, ratio_of_medians
from inferlab.errors import UsageError
from inferlab.records import total_stats

LEVEL = 0.05
"""A difference is seen where its p-value, corrected for all metrics, is below."""

REFERENCE = "hf"
SPEEDS = {"x_hf": "x HF generate", "tokens_per_second": "tokens per second"} | {
    key: title for key, title in TIMES.items() if key != "ms_per_token"
}
ACCEPTANCE = {
    "mean_accepted_length": "accepted length (all steps)",
    "acceptance_rate": "acceptance rate (all steps)",
}
MORE_IS_BETTER = ("x_hf", "tokens_per_second", *ACCEPTANCE)
LEARNED = ("steps_by_nodes", "predicted_speedup", "speedup", "verdict")
"""What a controller says of a run, not of its settings."""

Verdict = Literal["faster", "slower", "more", "less", "no difference seen"]


class PromptPair(TypedDict):
    """Medians over the runs of a prompt, or of prompts that were decoded together."""

    prompts: list[str]
    a: float
    b: float


class Metric(TypedDict):
    """``a`` and ``b``: medians over prompts of medians over runs, which are in ``by_prompt``;
    acceptance is of all steps together. ``ratio``: b over a, of the medians (None: a is 0).
    ``p``: by `permutation_p`, then corrected. ``exact``: it does not depend on times, so any
    difference is one of the two builds."""

    a: float
    b: float
    ratio: float | None
    ci95: Interval
    p: float
    p_corrected: float
    exact: bool
    verdict: Verdict
    prompts: int
    by_prompt: list[PromptPair]


class Position(TypedDict):
    """Of a position of the drafts: how often it was accepted, and offered."""

    a: float | None
    b: float | None
    offered: tuple[int, int]


class IdDifference(TypedDict):
    """A prompt whose token ids differ, and where first."""

    prompt: str
    position: int
    token_ids: list[int | None]


class Ids(TypedDict):
    """``prompts``: those of which both results have ids."""

    prompts: int
    identical: int
    differences: list[IdDifference]


class ModeComparison(TypedDict):
    """Of one way to decode; pairs are of both results."""

    runs: tuple[int, int]
    metrics: dict[str, Metric]
    acceptance_by_position: list[Position]
    token_ids: Ids


class Setting(TypedDict):
    """What is not the same in both."""

    name: str
    a: str
    b: str


class CompareStats(TypedDict):
    """The JSON of `inferlab bench compare`."""

    a: str
    b: str
    settings: list[Setting]
    environment: list[Setting]
    prompts: dict[str, int]
    failures: tuple[int, int]
    tolerance: float
    acceptance_tolerance: float
    modes: dict[str, ModeComparison]
    regressions: list[str]


Groups = dict[tuple[str, ...], list[Sample]]


@dataclass(frozen=True)
class _Side:
    """One result: mode -> prompts -> its runs that succeeded; and how many failed."""

    modes: dict[str, Groups]
    failures: int

    @staticmethod
    def of(stats: Mapping[str, Any]) -> _Side:
        texts = prompts_of(stats)
        modes: dict[str, Groups] = {}
        samples = samples_of(stats)
        for sample in samples:
            groups = modes.setdefault(sample.mode, {})
            if sample.error is None:
                groups.setdefault(tuple(texts[i] for i in sample.prompts), []).append(sample)
        _add_times_reference(modes)
        failed = sum(sample.error is not None for sample in samples)
        return _Side(modes, max(failed, len(stats.get("failures", ()))))


def _add_times_reference(modes: Mapping[str, Groups]) -> None:
    """Adds ``x_hf`` to runs beside which, of the same round, Hugging Face's decoded."""
    for mode, groups in modes.items():
        batch, comma, name = mode.rpartition(", ")
        reference = modes.get(f"{batch}{comma}{REFERENCE}", {})
        if name == REFERENCE:
            continue
        for key, runs in groups.items():
            speeds = {s.iteration: s.figures["tokens_per_second"] for s in reference.get(key, ())}
            for place, run in enumerate(runs):
                if speeds.get(run.iteration):
                    times = run.figures["tokens_per_second"] / speeds[run.iteration]
                    runs[place] = replace(run, figures={**run.figures, "x_hf": times})


def compare_results(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    *,
    names: tuple[str, str] = ("A", "B"),
    tolerance: float = 0.05,
    acceptance_tolerance: float = 0.01,
) -> CompareStats:
    """Compares the result ``b`` with ``a``, on the prompts that both have.

    Args:
        a, b: results of `inferlab bench`, as their JSON says.
        tolerance: a slow-down is a regression where it is larger, and not by chance.
        acceptance_tolerance: of accepted length and acceptance rate: a fall is a regression where
            it is larger, and exact or not by chance.

    Raises:
        UsageError: they have no prompt, or no mode, in common.
    """
    sides = _Side.of(a), _Side.of(b)
    pairs = [(mode, mode) for mode in sides[0].modes if mode in sides[1].modes]
    if not pairs and sides[0].modes and sides[1].modes:
        first, second = (next(iter(side.modes)) for side in sides)
        pairs = [(first, second)]
    modes = {}
    for first, second in pairs:
        name = first if first == second else f"{first} against {second}"
        modes[name] = _compare_mode(sides[0], first, sides[1], second)
    texts = set(prompts_of(a)), set(prompts_of(b))
    shared = texts[0] & texts[1]
    before, after = (side.failures for side in sides)
    if not shared or not (after > before or any(mode["metrics"] for mode in modes.values())):
        raise UsageError(
            f"{names[0]} and {names[1]} have no prompt in common that both decoded; give results "
            "of the same prompts"
        )
    _correct(modes)
    regressions = [
        text
        for mode, found in modes.items()
        for text in _regressions(mode, found, tolerance, acceptance_tolerance)
    ]
    if after > before:
        regressions.append(f"{after} runs failed, {before} before")
    return {
        "a": names[0],
        "b": names[1],
        "settings": _differences(_settings(a), _settings(b)),
        "environment": _differences(_environment(a), _environment(b)),
        "prompts": {"a": len(texts[0]), "b": len(texts[1]), "shared": len(shared)},
        "failures": (before, after),
        "tolerance": tolerance,
        "acceptance_tolerance": acceptance_tolerance,
        "modes": modes,
        "regressions": regressions,
    }


def _compare_mode(one: _Side, first: str, other: _Side, second: str) -> ModeComparison:
    groups, others = one.modes[first], other.modes[second]
    keys = [key for key in groups if key in others]
    sides = [groups[key] for key in keys], [others[key] for key in keys]
    stats = [total_stats(r for runs in side for s in runs for r in s.records) for side in sides]
    metrics = {key: _metric(key, keys, *sides) for key in (*SPEEDS, *ACCEPTANCE)}
    found = {key: metric for key, metric in metrics.items() if metric is not None}
    for key in ACCEPTANCE:
        if not all(total.proposed for total in stats):
            found.pop(key, None)  # nothing was drafted
        elif key in found:
            found[key]["a"], found[key]["b"] = (getattr(total, key) for total in stats)
            found[key]["exact"] = all(_is_timeless(side) for side in sides)
    return {
        "runs": (_count(groups), _count(others)),
        "metrics": found,
        "acceptance_by_position": _positions(*stats),
        "token_ids": _token_ids(keys, *sides),
    }


def _count(groups: Groups) -> int:
    return sum(len(runs) for runs in groups.values())


def _metric(
    key: str,
    prompts: Sequence[tuple[str, ...]],
    one: Sequence[Sequence[Sample]],
    other: Sequence[Sequence[Sample]],
) -> Metric | None:
    old: list[list[float]] = []
    new: list[list[float]] = []
    by_prompt: list[PromptPair] = []
    for texts, runs, others in zip(prompts, one, other, strict=True):
        a, b = ([s.figures[key] for s in side if key in s.figures] for side in (runs, others))
        if a and b:
            old.append(a)
            new.append(b)
            by_prompt.append({"prompts": list(texts), "a": median(a), "b": median(b)})
    if not by_prompt:
        return None
    positive = all(value > 0 for values in (*old, *new) for value in values)
    found = ratio_of_medians(new, old, paired=False) if positive else {"ratio": None, "ci95": None}
    logs = (
        [[[math.log(value) for value in values] for values in side] for side in (old, new)]
        if positive
        else [old, new]
    )
    return {
        "a": median(pair["a"] for pair in by_prompt),
        "b": median(pair["b"] for pair in by_prompt),
        "ratio": found["ratio"],
        "ci95": found["ci95"],
        "p": permutation_p(logs[1], logs[0]),
        "p_corrected": 1.0,
        "exact": False,
        "verdict": "no difference seen",
        "prompts": len(by_prompt),
        "by_prompt": by_prompt,
    }


def _is_timeless(groups: Sequence[Sequence[Sample]]) -> bool:
    """Whether what was drafted depended on no clock: the controller `cost` measures times."""
    told = [r.speculation for runs in groups for s in runs for r in s.records if r.speculation]
    return bool(told) and all(one.controller.get("controller") != "cost" for one in told)


def _correct(modes: Mapping[str, ModeComparison]) -> None:
    """Corrects the p-values of all metrics of all modes, and gives the verdicts."""
    every = [(key, metric) for mode in modes.values() for key, metric in mode["metrics"].items()]
    corrected = holm([metric["p"] for _, metric in every])
    for (key, metric), p in zip(every, corrected, strict=True):
        metric["p_corrected"] = p
        if metric["a"] == metric["b"] or not (p < LEVEL or metric["exact"]):
            continue
        better = (metric["b"] > metric["a"]) == (key in MORE_IS_BETTER)
        if key in ACCEPTANCE:
            metric["verdict"] = "more" if better else "less"
        else:
            metric["verdict"] = "faster" if better else "slower"


def _regressions(
    mode: str, found: ModeComparison, tolerance: float, acceptance_tolerance: float
) -> list[str]:
    texts = []
    referred = mode.rpartition(", ")[2] == REFERENCE or "x_hf" in found["metrics"]
    for key, metric in found["metrics"].items():
        if referred and key not in (*ACCEPTANCE, "x_hf"):
            continue
        allowed = acceptance_tolerance if key in ACCEPTANCE else tolerance
        if metric["verdict"] in ("slower", "less") and _loss(key, metric) > allowed:
            title = {**SPEEDS, **ACCEPTANCE}[key]
            texts.append(
                f"{mode}: {title} went from {metric['a']:.4g} to {metric['b']:.4g}, "
                f"{_loss(key, metric):.1%} worse; {allowed:.1%} is allowed"
            )
    return texts


def _loss(key: str, metric: Metric) -> float:
    """How much worse b is, as a share of a."""
    old, new = metric["a"], metric["b"]
    if key not in ACCEPTANCE and metric["ratio"] is not None:
        old, new = 1.0, metric["ratio"]
    if key in MORE_IS_BETTER:
        old, new = -old, -new
    return (new - old) / abs(old) if old else 0.0


def _positions(one: Any, other: Any) -> list[Position]:
    rates = one.acceptance_by_position, other.acceptance_by_position
    if not all(rates):
        return []
    places = range(max(len(of) for of in rates))
    return [
        {
            "a": rates[0][i] if i < len(rates[0]) else None,
            "b": rates[1][i] if i < len(rates[1]) else None,
            "offered": (_at(one.offered_at, i), _at(other.offered_at, i)),
        }
        for i in places
    ]


def _at(counts: Sequence[int], place: int) -> int:
    return counts[place] if place < len(counts) else 0


def _token_ids(
    keys: Sequence[tuple[str, ...]],
    one: Sequence[Sequence[Sample]],
    other: Sequence[Sequence[Sample]],
) -> Ids:
    """Compares the ids of all runs of a prompt with those of its first run in ``one``."""
    count = 0
    differences: list[IdDifference] = []
    for key, runs, others in zip(keys, one, other, strict=True):
        for place, text in enumerate(key):
            ids, theirs = _ids_at(runs, place), _ids_at(others, place)
            if not ids or not theirs:
                continue
            count += 1
            found = next(
                filter(None, (first_difference(ids[0], of) for of in (*ids, *theirs))), None
            )
            if found is not None:
                position, tokens = found
                differences.append(
                    {"prompt": text, "position": position, "token_ids": list(tokens)}
                )
    return {
        "prompts": count,
        "identical": count - len(differences),
        "differences": differences,
    }


def _ids_at(runs: Sequence[Sample], place: int) -> list[list[int]]:
    found = [s.records[place].token_ids for s in runs if place < len(s.records)]
    return [ids for ids in found if ids is not None]


def _settings(stats: Mapping[str, Any]) -> dict[str, Any]:
    of_load = stats.get("loads", [stats])[0]  # those of a sweep differ in the load alone
    found = of_load.get("settings") or {key: stats[key] for key in SETTINGS if key in stats}
    settings = dict(found)
    if isinstance(controller := settings.get("controller"), Mapping):
        settings["controller"] = {k: v for k, v in controller.items() if k not in LEARNED}
    return {k: v for k, v in settings.items() if k not in ("iterations", "prompts", "drafters")}


def _environment(stats: Mapping[str, Any]) -> dict[str, Any]:
    of_load = stats.get("loads", [stats])[0]
    return {key: value for key, value in of_load["environment"].items() if key != "time"}


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Setting]:
    names = list(dict.fromkeys((*one, *other)))
    texts = {name: (_short(one, name), _short(other, name)) for name in names}
    return [{"name": name, "a": a, "b": b} for name, (a, b) in texts.items() if a != b]


def _short(settings: Mapping[str, Any], name: str) -> str:
    return short(settings[name]) if settings.get(name) is not None else "none"
