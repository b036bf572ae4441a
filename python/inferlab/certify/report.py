"""Certificates as reports: what was found, in lines and tables."""

from __future__ import annotations

from inferlab.certify.outputs import (
    Certificate,
    Check,
    Estimate,
    GreedyCertificate,
    LosslessCertificate,
    QualityCertificate,
)
from inferlab.reports.model import Lines, Part, Report, Table

PARTS = {
    "exact": "laws of small vocabularies, read off",
    "trap": "inputs that broke others",
    "trees": "trees of small vocabularies",
    "sampled": "samples of the engine",
    "replay": "replays, same seeds",
}


def certificate_report(certificate: Certificate) -> Report:
    """A certificate's tables; its summary comes last."""
    of = ", ".join(f"{model['name']} ({model['format']})" for model in certificate["models"])
    place = certificate["environment"]
    machine = f"{place['processor']}, {place['cores']} cores"
    versions = f"torch {place['torch']}, inferlab {place['inferlab']}"
    parts: list[Part]
    if certificate["kind"] == "lossless":
        parts = _lossless(certificate)
    elif certificate["kind"] == "greedy":
        parts = _greedy(certificate)
    else:
        parts = _quality(certificate)
    facts = [("models", of), ("machine", f"{machine}; {versions}")]
    parts.append(Lines([certificate["summary"]], alarm=not certificate["certified"]))
    return Report(f"certify {certificate['kind']}", facts, parts)


def _lossless(certificate: LosslessCertificate) -> list[Part]:
    rows = []
    for part, title in PARTS.items():
        checks = [check for check in certificate["checks"] if check["part"] == part]
        if checks:
            good = sum(check["passed"] for check in checks)
            rows.append((title, str(len(checks)), str(good), _farthest(checks)))
    columns: tuple[str, ...] = ("part", "checks", "passed", "farthest from the target")
    parts: list[Part] = [Table(columns, rows, "checks[]")]
    wrong = [check for check in certificate["checks"] if not check["passed"]]
    if wrong:
        said = [f"failed: {check['name']}: {check['detail']}" for check in wrong]
        parts.append(Lines(said, alarm=True))
    measured = [check for check in certificate["checks"] if check["part"] == "sampled"]
    if measured:
        level = f"{certificate['confidence']:.0%}"
        columns = ("sampled", f"TV ({level})", f"KL ({level})", "p", "accepted length")
        parts.append(Table(columns, list(map(_sampled, measured)), "checks[].distance"))
    return parts


def _sampled(check: Check) -> tuple[str, ...]:
    of = check["distance"]
    return (
        check["name"],
        f"{of['tv']:.4f} ({_bounds(of['tv_interval'])})",
        f"{_number(of['kl'])} ({_bounds(of['kl_interval'])})",
        _number(of["p_value"], 2),
        f"{check['accepted_length']:.2f}",
    )


def _farthest(checks: list[Check]) -> str:
    distances = [check["distance"] for check in checks if "distance" in check]
    if not distances:
        compared = sum(check.get("compared", 0) for check in checks)
        return f"{compared} texts, token for token" if compared else ""
    worst = max(distances, key=lambda of: of["tv"])
    return f"TV {worst['tv']:.4f} ({_bounds(worst['tv_interval'])})"


def _greedy(certificate: GreedyCertificate) -> list[Part]:
    divergences = certificate["divergences"]
    if not divergences:
        return [Lines([f"no divergence from {certificate['against']}"])]
    ways = list(divergences[0]["margins"])
    columns = (
        "prompt", "position", "ours", "theirs", *(f"margin, {way}" for way in ways),
        "top-2 margin", "allowed", "verdict",
    )  # fmt: skip
    rows = [
        (
            str(one["prompt_index"]),
            str(one["position"]),
            str(one["ours"]),
            str(one["theirs"]),
            *(f"{one['margins'][way]:.4f}" for way in ways),
            f"{one['top2_margin']:.4f}",
            f"{one['allowed']:.4f}",
            "tie within rounding" if one["verdict"] == "tie" else f"bug: {one['verdict']}",
        )
        for one in divergences
    ]
    return [Table(columns, rows, "divergences[]")]


def _quality(certificate: QualityCertificate) -> list[Part]:
    level = f"{certificate['confidence']:.0%}"
    columns = (
        "variant", f"perplexity of outputs ({level})", "same outputs", "perplexity of the text",
        f"KL ({level})", "same best token",
    )  # fmt: skip
    rows = [
        (
            row["variant"],
            _estimate(row["output_perplexity"]),
            _estimate(row["same_outputs"]),
            _estimate(row["text_perplexity"]),
            _estimate(row["kl"], 5),
            _estimate(row["top1"]),
        )
        for row in certificate["rows"]
    ]
    return [Table(columns, rows, "rows[]")]


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
