"""Certificates for people: what was found, in lines and tables."""

from __future__ import annotations

from rich.console import Console

from inferlab.benchmarks.modes_table import markdown_table
from inferlab.certify.outputs import (
    Certificate,
    Check,
    Estimate,
    GreedyCertificate,
    LosslessCertificate,
    QualityCertificate,
)

PARTS = {
    "exact": "laws of small vocabularies, read off",
    "trap": "inputs that broke others",
    "trees": "trees of small vocabularies",
    "sampled": "samples of the engine",
    "replay": "replays, same seeds",
}


def print_certificate(certificate: Certificate, console: Console | None = None) -> None:
    """Prints a certificate; its summary comes last."""
    console = console or Console(highlight=False, width=160)
    of = ", ".join(f"{model['name']} ({model['format']})" for model in certificate["models"])
    place = certificate["environment"]
    versions = f"torch {place['torch']}, inferlab {place['inferlab']}"
    console.print(f"{of}; {place['processor']}, {place['cores']} cores, {versions}", markup=False)
    console.print()
    if certificate["kind"] == "lossless":
        _print_lossless(certificate, console)
    elif certificate["kind"] == "greedy":
        _print_greedy(certificate, console)
    else:
        _print_quality(certificate, console)
    console.print()
    console.print(certificate["summary"], markup=False)


def _print_lossless(certificate: LosslessCertificate, console: Console) -> None:
    table = markdown_table("part", "checks", "passed", "farthest from the target")
    for part, title in PARTS.items():
        checks = [check for check in certificate["checks"] if check["part"] == part]
        if checks:
            good = sum(check["passed"] for check in checks)
            table.add_row(title, str(len(checks)), str(good), _farthest(checks))
    console.print(table)
    wrong = [check for check in certificate["checks"] if not check["passed"]]
    for check in wrong:
        console.print(f"failed: {check['name']}: {check['detail']}", markup=False)
    measured = [check for check in certificate["checks"] if check["part"] == "sampled"]
    if measured:
        console.print()
        level = f"{certificate['confidence']:.0%}"
        samples = markdown_table(
            "sampled", f"TV ({level})", f"KL ({level})", "p", "accepted length"
        )
        for check in measured:
            of = check["distance"]
            samples.add_row(
                check["name"],
                f"{of['tv']:.4f} ({_bounds(of['tv_interval'])})",
                f"{_number(of['kl'])} ({_bounds(of['kl_interval'])})",
                _number(of["p_value"], 2),
                f"{check['accepted_length']:.2f}",
            )
        console.print(samples)


def _farthest(checks: list[Check]) -> str:
    distances = [check["distance"] for check in checks if "distance" in check]
    if not distances:
        compared = sum(check.get("compared", 0) for check in checks)
        return f"{compared} texts, token for token" if compared else ""
    worst = max(distances, key=lambda of: of["tv"])
    return f"TV {worst['tv']:.4f} ({_bounds(worst['tv_interval'])})"


def _print_greedy(certificate: GreedyCertificate, console: Console) -> None:
    divergences = certificate["divergences"]
    if not divergences:
        console.print(f"no divergence from {certificate['against']}", markup=False)
        return
    ways = list(divergences[0]["margins"])
    table = markdown_table(
        "prompt", "position", "ours", "theirs", *(f"margin, {way}" for way in ways),
        "top-2 margin", "allowed", "verdict",
    )  # fmt: skip
    for one in divergences:
        verdict = one["verdict"]
        table.add_row(
            str(one["prompt_index"]),
            str(one["position"]),
            str(one["ours"]),
            str(one["theirs"]),
            *(f"{one['margins'][way]:.4f}" for way in ways),
            f"{one['top2_margin']:.4f}",
            f"{one['allowed']:.4f}",
            "tie within rounding" if verdict == "tie" else f"bug: {verdict}",
        )
    console.print(table)


def _print_quality(certificate: QualityCertificate, console: Console) -> None:
    level = f"{certificate['confidence']:.0%}"
    table = markdown_table(
        "variant", f"perplexity of outputs ({level})", "same outputs", "perplexity of the text",
        f"KL ({level})", "same best token",
    )  # fmt: skip
    for row in certificate["rows"]:
        table.add_row(
            row["variant"],
            _estimate(row["output_perplexity"]),
            _estimate(row["same_outputs"]),
            _estimate(row["text_perplexity"]),
            _estimate(row["kl"], 5),
            _estimate(row["top1"]),
        )
    console.print(table)


def _estimate(estimate: Estimate, digits: int = 3) -> str:
    value, interval = estimate["value"], estimate["interval"]
    if value is None:
        return ""
    text = f"{value:.{digits}f}"
    return text if interval is None else f"{text} ({_bounds(interval, digits)})"


def _bounds(interval: tuple[float | None, float | None], digits: int = 4) -> str:
    return " to ".join(_number(value, digits) for value in interval)


def _number(value: float | None, digits: int = 4) -> str:
    return "inf" if value is None else f"{value:.{digits}f}"
