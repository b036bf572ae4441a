"""`--check FILE`: a certificate is made again from its own settings, and compared."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from inferlab.certify.greedy import certify_greedy
from inferlab.certify.lossless import certify_lossless
from inferlab.certify.outputs import (
    Certificate,
    GreedyCertificate,
    LosslessCertificate,
    QualityCertificate,
    Rechecked,
)
from inferlab.certify.quality import certify_quality
from inferlab.errors import UsageError
from inferlab.output import differences, refuse_constant, to_json

_MAKERS: dict[str, tuple[Any, Any]] = {
    "lossless": (LosslessCertificate, certify_lossless),
    "greedy": (GreedyCertificate, certify_greedy),
    "quality": (QualityCertificate, certify_quality),
}
KINDS = tuple(_MAKERS)

TRUST = ("trust_remote_code", "allow_pickle")
"""Keys of a configuration that let a checkpoint run code."""

_NOT_COMPARED = {"environment", "time"}
# On another processor, or with other threads, kernels and products may round otherwise.
_PLACE = ("system", "processor", "simd", "gpus", "inferlab", "torch", "transformers", "numpy")


def read_certificate(path: str | Path, kind: str) -> Certificate:
    """A certificate from its file.

    Raises:
        UsageError: it cannot be read, or is no certificate of that kind.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"--check: {path} cannot be read: {why}") from None
    found = value.get("kind") if isinstance(value, dict) else None
    if found != kind:
        other = f"inferlab certify {found} --check" if found in KINDS else "a file of --output"
        raise UsageError(f"--check: {path} is no certificate of {kind}; use {other}")
    try:
        certificate: Certificate = TypeAdapter(_MAKERS[kind][0]).validate_python(value)
    except ValidationError as error:
        raise UsageError(f"--check: {path}: {_first(error)}") from None
    return certificate


def recheck(stated: Certificate, *, trusted: Collection[str] = (), **options: Any) -> Rechecked:
    """Makes a certificate again.

    On the machine and with the versions that it was made on every figure must come out again, on
    others what is claimed: the models, each verdict, whether it is certified.

    Args:
        trusted: of `TRUST`, what a checkpoint may do here; the word of a file is not enough.
        options: of the function that makes it.

    Raises:
        UsageError: settings that are not allowed, or that ask for what is not trusted.
    """
    kind: Any = stated["kind"]
    settings: Any = stated["settings"]
    config = settings.get("config")
    for key in TRUST:
        if isinstance(config, Mapping) and config.get(key) and key not in trusted:
            flag = f"--{key.replace('_', '-')}"
            raise UsageError(
                f"--check: its models were read with {flag}, which can run their code; give "
                f"{flag}, too, if you trust them"
            )
    try:
        made: Certificate = _MAKERS[kind][1](settings, **options)
    except ValidationError as error:
        raise UsageError(f"--check: settings: {_first(error)}") from None
    one, other = (json.loads(to_json(certificate)) for certificate in (stated, made))
    same_place = all(
        stated["environment"].get(key) == made["environment"].get(key) for key in _PLACE
    )
    if not same_place:
        one, other = _claims(one), _claims(other)
    found = [_told(*difference) for difference in differences(one, other, skip=_NOT_COMPARED)]
    figures = "every figure" if same_place else "each verdict, on another machine or versions,"
    summary = f"confirmed: {figures} came out again; {made['summary']}"
    if found:
        summary = f"not confirmed: {len(found)} differences, the first: {found[0]}"
    return {
        "kind": "check",
        "confirmed": not found,
        "summary": summary,
        "differences": found,
        "certificate": made,
    }


def _first(error: ValidationError) -> str:
    """Where a value is that is not allowed, and what is."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _claims(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """What does not depend on the last bits of a machine's arithmetic."""
    return {
        "certified": certificate["certified"],
        "models": certificate["models"],
        "checks": [
            {"name": check["name"], "passed": check["passed"]}
            for check in certificate.get("checks", ())
        ],
        "prompts": certificate.get("prompts"),
        "bugs": [one for one in certificate.get("divergences", ()) if one["verdict"] != "tie"],
        "rows": [row["variant"] for row in certificate.get("rows", ())],
    }


def _told(where: str, *values: Any) -> str:
    """A difference in words: what was stated and what was found, cut."""
    shown = (text if len(text := to_json(value)) < 80 else text[:77] + "..." for value in values)
    return "{}: stated {}, found {}".format(where, *shown)
