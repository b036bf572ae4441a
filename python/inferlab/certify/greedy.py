"""`inferlab certify greedy`: every divergence from another engine, with margins and a verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from inferlab.benchmarks.comparison import first_difference
from inferlab.benchmarks.divergence import (
    TIE_STEPS,
    rounding_step,
    row_behind,
    row_by_one,
)
from inferlab.benchmarks.environment import describe_environment
from inferlab.benchmarks.runners import GenerateRunner
from inferlab.certify.facts import config_of, describe_model
from inferlab.certify.outputs import Divergence, GreedyCertificate
from inferlab.config import SpecdecConfig
from inferlab.errors import UsageError
from inferlab.models import TargetModel, loading, plain_model, unknown_ids
from inferlab.specdec.pipeline import SpeculativePipeline

MOST = 32
"""Divergences of a prompt that are looked at."""

Tokens = list[int]


class Settings(TypedDict):
    """What a certificate of greedy decoding is made of; `--check` makes it again.

    Attributes:
        config: of models and drafter, as keys of SpecdecConfig.
        prompts: texts, or token ids.
        recorded: new tokens of another engine for each prompt; null: those of `generate`.
        against: who made them.
        exact: what margins are recomputed in, on the CPU.
    """

    config: dict[str, Any]
    prompts: list[str | Tokens]
    recorded: list[Tokens] | None
    against: str
    max_tokens: int
    exact: Literal["float32", "float64"]


def certify_greedy(
    settings: Settings, *, on_prompt: Callable[[dict[str, Any]], None] | None = None
) -> GreedyCertificate:
    """Decodes greedily with drafts and compares with the other side, token by token.

    Behind a divergence the comparison goes on along the other side's text: the engine decodes what
    follows its token, so that each place where the two differ is found, not the first alone.

    Args:
        on_prompt: called with the divergences of each prompt as it is done.

    Raises:
        ValueError: models that cannot be loaded or whose weights are packed, prompts that cannot be
            decoded.
    """
    settings = TypeAdapter(Settings).validate_python(settings)
    config = config_of(settings).model_copy(
        update={"max_new_tokens": settings["max_tokens"], "ignore_generation_config": True}
    )
    pipeline = SpeculativePipeline(config=config)
    target = pipeline.target
    if target.quantization is not None:
        raise UsageError(
            f"--base-model: {target.name} has {target.quantization} weights, whose products have "
            "no higher precision to be recomputed in; give the model that it was packed from"
        )
    judge = _Judge(target, config, settings["exact"])
    recorded = settings["recorded"]
    _check_recorded(recorded, len(settings["prompts"]), target)
    divergences: list[Divergence] = []
    identical = tokens = 0
    for index, prompt in enumerate(settings["prompts"]):
        ids = pipeline.encode(prompt)
        theirs = recorded[index] if recorded is not None else _generated(target, config, prompt)
        found = _compare(pipeline, judge, ids, theirs)
        found = [{**one, "prompt_index": index} for one in found]
        divergences += found
        identical += not found
        tokens += len(theirs)
        if on_prompt is not None:
            on_prompt({"prompt_index": index, "divergences": found})
    bugs = sum(one["verdict"] != "tie" for one in divergences)
    environment: Any = describe_environment()
    count = len(settings["prompts"])
    return {
        "kind": "greedy",
        "certified": bugs == 0,
        "summary": f"{'not certified' if bugs else 'certified'}: {identical} of {count} prompts "
        f"identical, {tokens} tokens, {len(divergences) - bugs} ties within rounding, {bugs} bugs",
        "against": settings["against"],
        "environment": environment,
        "models": [describe_model(model) for model in (target, pipeline.draft_model) if model],
        "settings": dict(settings),
        "prompts": count,
        "identical": identical,
        "tokens": tokens,
        "divergences": divergences,
    }


def _check_recorded(recorded: list[Tokens] | None, prompts: int, target: TargetModel) -> None:
    """Raises UsageError where ids are not the target's, or not of as many prompts."""
    if recorded is None:
        return
    if len(recorded) != prompts:
        raise UsageError(f"recorded has {len(recorded)} lists of token ids for {prompts} prompts")
    for index, token in ((at, token) for at, ids in enumerate(recorded) for token in ids):
        if not 0 <= token < target.vocab_size:
            raise UsageError(
                f"--ids: entry {index}: {token} is no token id of {target.name}, whose ids are in "
                f"[0, {target.vocab_size})"
            )


def _generated(target: TargetModel, config: SpecdecConfig, prompt: str | Tokens) -> Tokens:
    if not isinstance(prompt, str):
        raise UsageError("prompts given as token ids need --ids, with what followed them")
    greedy = config.model_copy(update={"temperature": 0.0})
    ids: Tokens = GenerateRunner(target, greedy).run(prompt)["token_ids"]
    return ids


def _compare(
    pipeline: SpeculativePipeline, judge: _Judge, prompt: Tokens, theirs: Tokens
) -> list[Divergence]:
    """All divergences along their text, the first `MOST` at most."""
    found: list[Divergence] = []
    begin = 0
    while begin < len(theirs) and len(found) < MOST:
        behind = [*prompt, *theirs[:begin]]
        left = len(theirs) - begin
        # An end of text that they went on behind is no end here.
        asked: dict[str, Any] = {"max_tokens": left, "temperature": 0.0, "ignore_eos": True}
        ours = pipeline.generate([behind], **asked)[0]["token_ids"]
        difference = first_difference(ours, theirs[begin:])
        if difference is None:
            break
        at, (own, other) = difference
        assert own is not None
        assert other is not None
        judged = judge.divergence([*behind, *ours[:at]], own, other)
        found.append({**judged, "position": begin + at})
        begin += at + 1
    return found


class _Judge:
    """Recomputes the row that decided."""

    def __init__(self, target: TargetModel, config: SpecdecConfig, exact: str) -> None:
        self.target = target
        self.config = config
        self.exact = exact
        self._unknown = unknown_ids(target.tokenizer, target.vocab_size)

    @cached_property
    def _exact_model(self) -> Any:
        """The target in higher precision; loaded when there is something to judge."""
        loaded = loading.load(
            self.target.name,
            device="cpu",
            dtype="float32",
            trust_remote_code=self.config.trust_remote_code,
            allow_pickle=self.config.allow_pickle,
        )
        return loaded.model.to(getattr(torch, self.exact)).eval()

    def divergence(self, ids: Tokens, ours: int, theirs: int) -> Divergence:
        """Ours or theirs behind ``ids``: by how much, and who is right.

        Rounding is allowed `TIE_STEPS` steps of the model's dtype, or twice what it did to this
        very margin in either recomputation, where that is more.
        """
        with plain_model(self.target, "certify greedy") as model:
            rows = {"whole": row_behind(model, ids), "q1": row_by_one(model, ids)}
        rows[self.exact] = row_behind(self._exact_model, ids)
        margins = {}
        for name, row in rows.items():
            margins[name] = float(row[ours].double() - row[theirs].double())
        row = rows[self.exact].double().clone()
        row[self._unknown] = -torch.inf
        (first, second), best = (part.tolist() for part in row.topk(2))
        size = float(row[row > -torch.inf].abs().max())
        step = rounding_step(size, self.target.dtype)
        moved = max(abs(margins[name] - margins[self.exact]) for name in ("whole", "q1"))
        allowed = max(TIE_STEPS[self.target.dtype] * step, 2 * moved)
        behind = {"ours": first - float(row[ours]), "theirs": first - float(row[theirs])}
        wrong = [side for side, gap in behind.items() if not gap <= allowed]
        verdict: Any = "tie" if not wrong else "both" if len(wrong) == 2 else wrong[0]
        return {
            "prompt_index": 0,
            "position": 0,
            "ours": ours,
            "theirs": theirs,
            "best": best[0],
            "margin": margins[self.exact],
            "top2_margin": first - second,
            "margins": margins,
            "rounding_step": step,
            "allowed": allowed,
            "verdict": verdict,
        }


# --- what other engines wrote -------------------------------------------------------------------

_ID_KEYS = ("token_ids", "generated_tokens", "ids")


def read_recorded(path: str | Path) -> tuple[list[str | Tokens], list[Tokens]]:
    """Prompts and new tokens of another engine.

    A file of JSON lines, a JSON list, or an object with a list ``results``; entries have ``prompt``
    (a text or token ids) or ``prompt_token_ids``, and ``token_ids`` or ``ids`` of the new tokens,
    or ``outputs`` whose first entry has them, as vLLM's results do. Token ids beat the text.

    Raises:
        UsageError: a file that cannot be read, or an entry of another form, named.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"--ids: {path} cannot be read: {why}") from None
    entries = _entries(text, path)
    if not entries:
        raise UsageError(f"--ids: {path} holds no entries")
    pairs = [_entry(entry, f"{path}, entry {number}") for number, entry in enumerate(entries)]
    return [prompt for prompt, _ in pairs], [ids for _, ids in pairs]


def _entries(text: str, path: str | Path) -> list[Any]:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        whole = None
    if isinstance(whole, dict) and isinstance(whole.get("results"), list):
        return list(whole["results"])
    if whole is not None:
        return whole if isinstance(whole, list) else [whole]
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UsageError(f"--ids: {path}:{number}: is not JSON: {error.msg}") from None
    return entries


def _entry(entry: Any, where: str) -> tuple[str | Tokens, Tokens]:
    if not isinstance(entry, dict):
        raise UsageError(f"--ids: {where}: must be an object, with prompt and token_ids")
    outputs: Any = entry.get("outputs")
    if isinstance(outputs, Sequence) and outputs and isinstance(outputs[0], dict):
        entry = {**outputs[0], **entry}
    ids: Any = next((entry[key] for key in _ID_KEYS if key in entry), None)
    if not _is_ids(ids):
        raise UsageError(f"--ids: {where}: needs token_ids, a list of token ids with at least one")
    prompt: Any = entry.get("prompt_token_ids") or entry.get("prompt")
    if not (isinstance(prompt, str) and prompt) and not _is_ids(prompt):
        raise UsageError(f"--ids: {where}: needs prompt or prompt_token_ids")
    return prompt, ids


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
    )
