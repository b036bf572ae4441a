"""The report of `inferlab bench --mode local|http|specdec`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inferlab.benchmarks.comparison import MODE_TITLES
from inferlab.benchmarks.sample_plots import phase_bars, sample_plots
from inferlab.benchmarks.samples import modes_in, samples_of
from inferlab.reports.model import Heading, Lines, Part, Report, Table
from inferlab.reports.numbers import interval, number

FIGURE_TITLES = {
    "latency_ms": "latency, ms",
    "ms_per_token": "ms per token",
    "tokens_per_second": "tokens per second",
    "first_token_ms": "first token, ms",
    "ttft_ms": "TTFT, ms",
    "tpot_ms": "TPOT, ms",
    "acceptance_rate": "acceptance rate",
    "mean_accepted_length": "accepted length",
    "target_forwards": "target forwards",
    "num_tokens": "new tokens",
}
SETTINGS = (
    "base_model", "draft_model", "draft_mode", "max_draft", "tree", "policy", "controller",
    "model", "server", "endpoint", "stream", "implementation", "device", "dtype", "max_new_tokens",
    "temperature", "seed",
)  # fmt: skip
"""What was measured, as far as a mode knows it."""

COLUMNS = ("mean", "median", "std", "min", "max", "p90", "p99")


def run_report(stats: Mapping[str, Any]) -> Report:
    """The report of what `BenchmarkRunner.run_benchmark` returned."""
    title = f"{stats['mode']} benchmark ({stats['runner_name']})"
    trouble = failure_lines(stats)
    if "error" in stats:
        trouble.append(f"error: {stats['error']}")
    parts: list[Part] = [Lines(trouble, alarm=True)] if trouble else []
    if "error" not in stats:
        parts += _figures(stats)
    return Report(title, _facts(stats), parts, details=environment_facts(stats))


def failure_lines(stats: Mapping[str, Any]) -> list[str]:
    """A sentence for each run that failed, and one for Ctrl-C."""
    lines = ["interrupted: these are partial results"] if stats["interrupted"] else []
    for failure in stats["failures"]:
        where = f"{failure['mode']}, prompt {failure['prompt_index']}"
        where += f" ({failure['where']})" if "where" in failure else ""
        lines.append(f"failed: {where}, iteration {failure['iteration']}: {failure['error']}")
    return lines


def environment_facts(stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Machine and versions."""
    return [(key.replace("_", " "), short(value)) for key, value in stats["environment"].items()]


def short(value: Any) -> str:
    """A setting in a few words."""
    if isinstance(value, Mapping):
        return " ".join(str(item) if key in ("policy", "controller") else f"{key}={item}"
                        for key, item in value.items())  # fmt: skip
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _facts(stats: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [
        (key.replace("_", " "), short(stats[key])) for key in SETTINGS if stats.get(key) is not None
    ]
    if stats["num_prompts"] == 1:
        facts.append(("prompt", repr(stats["prompt"])))
    else:
        facts.append(("prompts", str(stats["num_prompts"])))
    return [
        *facts,
        ("iterations", f"{stats['iterations']} (warm-up: {stats['warmup_iterations']})"),
    ]


def _figures(stats: Mapping[str, Any]) -> list[Part]:
    rows = [
        (
            title,
            *(number(stats[key][name]) for name in COLUMNS),
            interval(stats[key]["median_ci95"]),
        )
        for key, title in FIGURE_TITLES.items()
        if key in stats
    ]
    main = stats["runs"][0]["mode"]
    parts: list[Part] = [
        Table(("", *COLUMNS, "95 % of median"), rows, f"runs[], those of mode {main}")
    ]
    phases = {main: stats["phases_ms_per_token"]} if "phases_ms_per_token" in stats else {}
    if phases:
        texts = ", ".join(f"{name} {ms:.3f}" for name, ms in phases[main].items())
        parts.append(Lines([f"ms per token: {texts}"]))
    if "perplexity" in stats:
        found = stats["perplexity"]
        parts.append(
            Lines(
                [
                    f"perplexity: {number(found['perplexity']) or 'infinite'} over "
                    f"{found['tokens']} tokens, under {found['model']}"
                ]
            )
        )
    comparison = stats.get("baseline_comparison")
    if comparison is not None:
        parts += [comparison_table(comparison), Lines(id_lines(comparison["token_ids"]))]
        phases |= {
            mode: of["phases_ms_per_token"]
            for mode, of in comparison["modes"].items()
            if "phases_ms_per_token" in of
        }
    modes = modes_in(samples_of(stats))
    parts.append(Heading("Distributions"))
    parts += sample_plots(modes, "runs[]", "raw_results[].record")
    parts += phase_bars(phases, "raw_results[].timings_ms, over their new tokens")
    parts += [Heading("By prompt"), _by_prompt(stats)]
    return parts


def _by_prompt(stats: Mapping[str, Any]) -> Table:
    rows = [
        (
            str(of["prompt_index"]),
            str(of["iterations"]),
            number(of["latency_ms"]),
            number(of["tokens_per_second"]),
            number(of.get("ms_per_token")),
            stats["prompts"][of["prompt_index"]],
        )
        for of in stats["by_prompt"]
    ]
    columns = ("prompt", "runs", "latency, ms", "tokens per second", "ms per token", "text")
    return Table(columns, rows, "runs[], medians", detail=True, texts=(5,))


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """Mode, tok/s, ms/token, accepted length, target forwards, speedups of each mode.

    Figures are medians over runs; speedups are ratios of medians over prompts, with the interval.
    """
    baselines = [mode for mode in ("plain", "hf") if f"speedup_vs_{mode}" in comparison]
    keys = ("tokens_per_second", "ms_per_token", "mean_accepted_length", "target_forwards")
    names = {"plain": "x plain", "hf": "x HF generate"}
    rows = []
    for index, (mode, figures) in enumerate(comparison["modes"].items()):
        cells = [number(figures[key]["median"]) if key in figures else "-" for key in keys]
        for baseline in baselines:
            found = comparison[f"speedup_vs_{baseline}"] if index == 0 else None
            if found is not None:
                cells.append(f"{found['ratio']:.2f} ({interval(found['ci95'])})")
            else:
                cells.append("1" if mode == baseline else "")
        rows.append((MODE_TITLES[mode], *cells))
    heads = ("mode", "tok/s", "ms/token", "accepted length", "target forwards")
    return Table((*heads, *(names[mode] for mode in baselines)), rows, "runs[], medians by mode")


def id_lines(token_ids: Mapping[str, Any]) -> list[str]:
    """What the comparison of token ids found, in sentences."""
    modes = ", ".join(token_ids["compared"])
    lines = []
    if token_ids["verdict"] == "identical":
        lines.append(f"token ids: identical for {token_ids['prompts']} prompts ({modes})")
    elif token_ids["verdict"] == "ties":
        lines.append(f"token ids ({modes}): differ by ties within rounding only")
    elif token_ids["verdict"] == "different":
        lines.append(f"token ids ({modes}): DIFFERENT, and not by ties within rounding")
    for entry in token_ids["differences"]:
        name = entry.get("where", f"prompt {entry['prompt_index']}")
        text = (
            f"  {name}, {' and '.join(entry['modes'])}: first at new token "
            f"{entry['position']}, {entry['token_ids'][0]} against {entry['token_ids'][1]}"
        )
        if "gap" in entry:
            text += f"; gap {entry['gap']:.3g}, rounding step {entry['rounding_step']:.3g}"
        lines.append(text + (" (a tie)" if entry["tie"] else ""))
    lines += [f"not compared: {mode}: {why}" for mode, why in token_ids["not_compared"].items()]
    return lines


def setting_facts(settings: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """Those of a table of many modes."""
    return [(name.replace("_", " "), short(settings[name])) for name in names]
