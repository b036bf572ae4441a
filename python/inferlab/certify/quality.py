"""`inferlab certify quality`: policies, formats and dtypes beside plain decoding of the target.

The reference is the target as it is, decoded plainly. Of every variant is told how the reference
finds its outputs (perplexity), how many of them are the reference's own, and, where its weights
differ, how its next-token distributions over a text differ: perplexity by a sliding window, KL from
the reference, agreement of the best tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from inferlab.benchmarks.environment import describe_environment
from inferlab.benchmarks.perplexity import log_probabilities, text_rows
from inferlab.benchmarks.statistics import bootstrap_interval
from inferlab.certify.facts import config_of, describe_model
from inferlab.certify.outputs import Estimate, Model, Quality, QualityCertificate
from inferlab.certify.statistics import CONFIDENCE, share_interval
from inferlab.config import SpecdecConfig
from inferlab.errors import UsageError
from inferlab.models import TargetModel, plain_model
from inferlab.specdec.pipeline import SpeculativePipeline

BLOCK = 64
"""Tokens of the text that are resampled together, as neighbours depend on each other."""
WINDOW = 512
REFERENCE = "reference"
NONE: Estimate = {"value": None, "interval": None}


class Settings(TypedDict):
    """What a table of quality is made of; `--check` makes it again.

    Attributes:
        config: of models, drafter, sampling and the policies' parameters, as keys of SpecdecConfig.
        policies, quantizations, dtypes: one row for each.
        prompts: continued by all variants, with ``max_tokens`` each.
        text: read for perplexity, KL and agreement.
        window, stride: of the text's perplexity, see `benchmarks.perplexity.text_rows`.
        max_kl: not certified where a variant's KL may be larger; null: whatever it is.
    """

    config: dict[str, Any]
    policies: list[str]
    quantizations: list[str]
    dtypes: list[str]
    prompts: list[str]
    max_tokens: int
    text: str
    window: int
    stride: int
    max_kl: float | None


def certify_quality(
    settings: Settings, *, on_row: Callable[[Quality], None] | None = None
) -> QualityCertificate:
    """Measures every variant.

    Args:
        on_row: called with each row as it is made.

    Raises:
        ValueError: models that cannot be loaded or have no weights, prompts that cannot be decoded,
            a text of fewer than two tokens.
    """
    settings = TypeAdapter(Settings).validate_python(settings)
    config = config_of(settings).model_copy(
        update={"max_new_tokens": settings["max_tokens"], "controller": "fixed"}
    )
    limit = settings["max_kl"]
    if limit is not None and not limit >= 0:
        raise UsageError(f"--max-kl: {limit:g} is not allowed; must be a number of nats, from 0 on")
    plainly = {"draft_mode": "none", "tree": None, "policy": "longest_prefix"}
    reference = SpeculativePipeline(config=config.model_copy(update=plainly))
    target = reference.target
    window = min(settings["window"], target.context_length or settings["window"])
    judge = _Judge(settings, reference, window, min(settings["stride"], window - 1))
    models: list[Model] = [describe_model(target)]
    rows: list[Quality] = []

    def add(row: Quality) -> None:
        rows.append(row)
        if on_row is not None:
            on_row(row)

    add(judge.row(REFERENCE, reference, target))
    for name, pipeline in _variants(settings, config, plainly, target):
        same = pipeline.target is target
        if not same:
            models.append(describe_model(pipeline.target))
        add(judge.row(name, pipeline, None if same else pipeline.target))
    over = [row["variant"] for row in rows if limit is not None and _most(row["kl"]) > limit]
    summary = f"{len(rows) - 1} variants beside plain decoding of {target.name}"
    if limit is not None:
        summary += f"; KL above {limit:g}: {', '.join(over) or 'none'}"
    environment: Any = describe_environment()
    return {
        "kind": "quality",
        "certified": not over,
        "summary": f"{'not certified' if over else 'certified'}: {summary}",
        "confidence": CONFIDENCE,
        "environment": environment,
        "models": models,
        "settings": dict(settings),
        "text_tokens": len(judge.text),
        "rows": rows,
    }


def _most(estimate: Estimate) -> float:
    """The upper end of its interval; without one nothing is known to be larger."""
    interval = estimate["interval"]
    value = interval[1] if interval is not None else estimate["value"]
    return 0.0 if value is None else value


def _variants(
    settings: Settings, config: SpecdecConfig, plainly: dict[str, Any], target: TargetModel
) -> Iterator[tuple[str, SpeculativePipeline]]:
    for policy in settings["policies"]:
        update = {"policy": policy}
        pipeline = SpeculativePipeline(config=config.model_copy(update=update), target=target)
        told = pipeline.policy.describe()
        parts = [f"{key} {told[key]}" for key in ("tau", "k", "p") if key in told]
        yield " ".join([policy, *parts]), pipeline
    for key, values in (
        ("quantization", settings["quantizations"]),
        ("dtype", settings["dtypes"]),
    ):
        for value in values:
            yield (
                value,
                SpeculativePipeline(config=config.model_copy(update={**plainly, key: value})),
            )


class _Judge:
    """The reference, and what it made of the prompts."""

    def __init__(
        self, settings: Settings, reference: SpeculativePipeline, window: int, stride: int
    ) -> None:
        self.target = reference.target
        self.window, self.stride = window, stride
        self.ids = [reference.encode(prompt) for prompt in settings["prompts"]]
        self.outputs = _outputs(reference, self.ids)
        self.text: list[int] = self.target.tokenizer.encode(settings["text"], verbose=False)

    def row(self, name: str, pipeline: SpeculativePipeline, weights: TargetModel | None) -> Quality:
        """Args: weights: what reads the text; None: the reference's own, where nothing differs."""
        outputs = self.outputs if name == REFERENCE else _outputs(pipeline, self.ids)
        same = sum(a == b for a, b in zip(outputs, self.outputs, strict=True))
        losses = []
        with plain_model(self.target, "certify quality") as model:
            for prompt, new in zip(self.ids, outputs, strict=True):
                if new:
                    losses.append([-x for x in log_probabilities(model, prompt, new)])
        found: Quality = {
            "variant": name,
            "output_perplexity": _exponential(losses),
            "same_outputs": {
                "value": same / len(outputs),
                "interval": share_interval(same, len(outputs), CONFIDENCE),
            },
            "text_perplexity": NONE,
            "kl": NONE,
            "top1": NONE,
        }
        if weights is None:
            return found
        return {**found, **self._text_figures(weights)}  # type: ignore[typeddict-item]

    def _text_figures(self, weights: TargetModel) -> dict[str, Estimate]:
        loss: list[float] = []
        kl: list[float] = []
        agree: list[float] = []
        reference = self._rows(self.target)
        for (ours, wanted), (theirs, _) in zip(self._rows(weights), reference, strict=True):
            own, other = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
            loss += (-own.gather(1, wanted[:, None])[:, 0]).tolist()
            kl += (other.exp() * (other - own)).nansum(-1).clamp(min=0).tolist()
            agree += (own.argmax(-1) == other.argmax(-1)).double().tolist()
        return {
            "text_perplexity": _exponential(_blocks(loss)),
            "kl": _mean(_blocks(kl)),
            "top1": _mean(_blocks(agree)),
        }

    def _rows(self, model: TargetModel) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As `text_rows`; the model is free for others between two of them."""
        with plain_model(model, "certify quality") as plain:
            rows = [
                (logits.cpu(), wanted.cpu())
                for logits, wanted in text_rows(plain, self.text, self.window, self.stride)
            ]
        yield from rows


def _outputs(pipeline: SpeculativePipeline, ids: Sequence[list[int]]) -> list[list[int]]:
    results = pipeline.generate([list(prompt) for prompt in ids])
    return [list(result["token_ids"]) for result in results]


def _blocks(values: Sequence[float]) -> list[list[float]]:
    return [list(values[i : i + BLOCK]) for i in range(0, len(values), BLOCK)]


def _mean(groups: Sequence[Sequence[float]]) -> Estimate:
    """The mean of all values; its bootstrap interval takes groups whole."""
    if not groups:
        return NONE
    sums = np.array([math.fsum(group) for group in groups])
    sizes = np.array([len(group) for group in groups], float)
    places = np.arange(len(groups), dtype=float)

    def mean_of(drawn: Any) -> Any:
        at = drawn.astype(int)
        return sums[at].sum(-1) / sizes[at].sum(-1)

    interval = bootstrap_interval(places, mean_of, method="percentile", confidence=CONFIDENCE)
    return {"value": float(sums.sum() / sizes.sum()), "interval": interval}


def _exponential(groups: Sequence[Sequence[float]]) -> Estimate:
    """A perplexity from losses."""
    mean = _mean(groups)
    interval = mean["interval"]
    return {
        "value": _exp(mean["value"]),
        "interval": None if interval is None else (_exp(interval[0]), _exp(interval[1])),
    }


def _exp(loss: float | None) -> float | None:
    return None if loss is None or loss > 700 else math.exp(loss)
