"""The JSON of certificates as types, of which its schema is made."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from typing_extensions import NotRequired, TypedDict

from inferlab.benchmarks.outputs import Environment
from inferlab.certify.readoff import Floats, Law
from inferlab.certify.statistics import (
    divergence,
    kl_interval,
    pearson,
    total_variation,
    tv_interval,
)

Bounds = tuple[float, float | None]
Part = Literal["exact", "trap", "trees", "sampled", "replay"]


class Distance(TypedDict):
    """How far what is emitted is from the target's distribution.

    Attributes:
        tv: total variation; ``tv_interval``: see `statistics.tv_interval`, or, of a law that was
            read off, by how much its probabilities are uncertain.
        kl: nats, of what is emitted from the target; null: infinite. Its interval is a bootstrap's,
            or, of a law that was read off, the value alone.
        p_value: of Pearson's test; null: no samples.
        samples: 0: read off, not sampled.
    """

    tv: float
    tv_interval: Bounds
    kl: float | None
    kl_interval: Bounds
    p_value: float | None
    samples: int
    cells: int


class Check(TypedDict):
    """One thing that was looked at. ``detail``: what was found, in words."""

    part: Part
    name: str
    passed: bool
    detail: str
    distance: NotRequired[Distance]
    compared: NotRequired[int]
    accepted_length: NotRequired[float]


def passed(part: Part, name: str, detail: str, distance: Distance | None = None) -> Check:
    """A check that found nothing wrong."""
    check: Check = {"part": part, "name": name, "passed": True, "detail": detail}
    if distance is not None:
        check["distance"] = distance
    return check


def failed(part: Part, name: str, detail: str, distance: Distance | None = None) -> Check:
    """A check that did."""
    return {**passed(part, name, detail, distance), "passed": False}


def exact_distance(law: Law, target: Floats) -> Distance:
    """Of a law that was read off, in intervals."""
    # What was never emitted, and cannot be, may be 0.
    middle = np.where((target == 0) & (law.low == 0), 0.0, law.middle)
    middle = middle / middle.sum()
    tv, kl = total_variation(middle, target), divergence(middle, target)
    size = len(target)
    slack = law.width * size / 2
    finite = kl if kl < float("inf") else None
    return {
        "tv": tv,
        "tv_interval": (max(tv - slack, 0.0), min(tv + slack, 1.0)),
        "kl": finite,
        "kl_interval": (0.0 if finite is None else finite, finite),
        "p_value": None,
        "samples": 0,
        "cells": size,
    }


def sampled_distance(counts: ArrayLike, target: ArrayLike) -> Distance:
    """Of samples in cells."""
    seen = np.asarray(counts, float)
    kl, kl_interval_ = kl_interval(seen, target)
    finite = [None if value == float("inf") else value for value in (kl, kl_interval_[1])]
    return {
        "tv": total_variation(seen / seen.sum(), target),
        "tv_interval": tv_interval(seen, target),
        "kl": finite[0],
        "kl_interval": (kl_interval_[0], finite[1]),
        "p_value": pearson(seen, target).p_value,
        "samples": int(seen.sum()),
        "cells": len(seen),
    }


class Model(TypedDict):
    """A model as it ran. ``format``: element type, and that of packed weights."""

    name: str
    format: str
    parameters: int
    vocab_size: int
    weights: str | None  # a digest of the first, middle and last weights; null: it has none


class LosslessCertificate(TypedDict):
    """Of `inferlab certify lossless`.

    Attributes:
        certified: the policy is lossless, and no check failed.
        false_alarm: chance that a lossless policy is not certified, all tests together.
        confidence: of each interval.
        settings: what `--check` runs again.
        checks: all of them; the failed ones say what is wrong.
    """

    kind: Literal["lossless"]
    certified: bool
    summary: str
    policy: dict[str, Any]
    false_alarm: float
    confidence: float
    environment: Environment
    models: list[Model]
    settings: dict[str, Any]
    checks: list[Check]


class Divergence(TypedDict):
    """A place where two sides chose differently behind the same tokens.

    Attributes:
        prompt_index, position: among the prompts, and among the new tokens, from 0.
        ours, theirs: token ids.
        margin: by how much ours is ahead of theirs in the recomputation of the highest precision;
            negative: behind. ``top2_margin``: of the two best tokens there; ``best``: the first.
        margins: the same difference by each recomputation: "q1", one token behind its cached
            prefix, "whole", the whole text at once, both of the model's dtype; "float64".
        rounding_step: distance of neighbouring numbers of the dtype at the size of the row.
        allowed: how far behind the best a token may be, by rounding alone.
        verdict: a tie within rounding, or who chose what rounding does not explain.
    """

    prompt_index: int
    position: int
    ours: int
    theirs: int
    best: int
    margin: float
    top2_margin: float
    margins: dict[str, float]
    rounding_step: float
    allowed: float
    verdict: Literal["tie", "ours", "theirs", "both"]


class GreedyCertificate(TypedDict):
    """Of `inferlab certify greedy`: certified if every divergence is a tie within rounding."""

    kind: Literal["greedy"]
    certified: bool
    summary: str
    against: str
    environment: Environment
    models: list[Model]
    settings: dict[str, Any]
    prompts: int
    identical: int
    tokens: int
    divergences: list[Divergence]


class Estimate(TypedDict):
    """A mean and its interval."""

    value: float | None
    interval: tuple[float | None, float | None] | None


class Quality(TypedDict):
    """A way of decoding beside the reference's, which is plain decoding of the target as it is.

    Attributes:
        variant: "reference", or what is different: a policy, a format or a dtype.
        output_perplexity: of its outputs, under the reference.
        same_outputs: share of the prompts that it continues as the reference does.
        text_perplexity: of the text, under it; null for policies: weights decide alone.
        kl: mean KL of its next-token distribution from the reference's over the text, nats.
        top1: share of the text's positions at which both have the same best token.
    """

    variant: str
    output_perplexity: Estimate
    same_outputs: Estimate
    text_perplexity: Estimate
    kl: Estimate
    top1: Estimate


class QualityCertificate(TypedDict):
    """Of `inferlab certify quality`: a table; certified if nothing failed to be measured."""

    kind: Literal["quality"]
    certified: bool
    summary: str
    confidence: float
    environment: Environment
    models: list[Model]
    settings: dict[str, Any]
    text_tokens: int
    rows: list[Quality]


Certificate = LosslessCertificate | GreedyCertificate | QualityCertificate


class Rechecked(TypedDict):
    """Of `--check`: confirmed where the certificate came out again, ``differences`` where not."""

    kind: Literal["check"]
    confirmed: bool
    summary: str
    differences: list[str]
    certificate: Certificate
