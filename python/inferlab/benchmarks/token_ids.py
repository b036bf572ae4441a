"""Do all modes give the same tokens? Where not: is it a tie within rounding, or a bug?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from inferlab.benchmarks.comparison import first_difference
from inferlab.benchmarks.divergence import judge_tie, row_behind
from inferlab.benchmarks.measure import Measurements
from inferlab.config import SpecdecConfig
from inferlab.kernels.noise import PURPOSE_TOKEN, gumbel_row
from inferlab.models import TargetModel

Explain = Callable[[int, Sequence[int], Sequence[int]], Mapping[str, Any]]
"""From a prompt's index and the ids of two runs to `explain_difference`."""


def compare_token_ids(
    measurements: Measurements,
    prompts: Sequence[str],
    config: SpecdecConfig,
    target: TargetModel,
) -> dict[str, Any]:
    """`compare_runs` of the modes of one engine and of Hugging Face's ways on its weights."""
    modes = dict.fromkeys(run.mode for run in measurements.runs)
    not_compared = {
        mode: why for mode in modes if (why := _why_not(mode, config, target)) is not None
    }

    def explain(index: int, one: Sequence[int], other: Sequence[int]) -> Mapping[str, Any]:
        return explain_difference(target, config, prompts[index], one, other)

    return compare_runs(measurements, len(prompts), not_compared, explain)


def compare_runs(
    measurements: Measurements,
    num_prompts: int,
    not_compared: Mapping[str, str],
    explain: Explain,
) -> dict[str, Any]:
    """Compares the token ids of all runs of each prompt with those of the first run.

    Args:
        not_compared: modes whose ids need not be equal, and why.

    Returns:
        ``compared``: the modes whose ids must be equal; ``not_compared``; ``prompts``: how many
        were compared; ``identical``: no difference; ``verdict``: "identical", "ties" (each
        difference is a tie within rounding), "different" or "nothing to compare"; ``differences``:
        a mapping per prompt that differs, with ``prompt_index``, ``modes``, ``position`` (of the
        first difference among the new tokens), ``token_ids`` (None: ended), and, where it can be
        told, ``scores`` of both, their ``gap``, ``rounding_step`` and ``tie``.
    """
    modes = list(dict.fromkeys(run.mode for run in measurements.runs))
    compared = [mode for mode in modes if mode not in not_compared]
    differences: list[dict[str, Any]] = []
    counted = 0
    for index in range(num_prompts):
        runs = [run for mode in compared for run in measurements.of(mode, index)]
        ids = [(run.mode, list((run.result or {})["token_ids"])) for run in runs]
        if len(ids) < 2:
            continue
        counted += 1
        first_mode, first = ids[0]
        for mode, other in ids[1:]:
            if other != first:
                difference = {"prompt_index": index, "modes": [first_mode, mode]}
                difference.update(explain(index, first, other))
                differences.append(difference)
                break
    if not counted:
        verdict = "nothing to compare"
    elif not differences:
        verdict = "identical"
    else:
        verdict = "ties" if all(entry["tie"] for entry in differences) else "different"
    return {
        "compared": compared,
        "not_compared": dict(not_compared),
        "prompts": counted,
        "identical": counted > 0 and not differences,
        "verdict": verdict,
        "differences": differences,
    }


def _why_not(mode: str, config: SpecdecConfig, target: TargetModel) -> str | None:
    """Why a mode's ids need not be those of plain decoding; None if they must."""
    if not mode.startswith("hf") and mode != "plain":
        return why_not_exact(config)
    if mode.startswith("hf"):
        if target.quantization is not None:
            return "its last bits, from other kernels, round inputs of products to other 8 bits"
        if config.effective_temperature > 0:
            return "Hugging Face samples from a noise of its own"
        if config.presence_penalty or config.frequency_penalty:
            return "Hugging Face has no presence or frequency penalty"
    return None


def why_not_exact(config: SpecdecConfig) -> str | None:
    """Why speculation need not give the tokens of plain decoding; None if it must."""
    greedy = config.effective_temperature == 0
    exact = config.policy == "longest_prefix" or (config.policy == "rejection" and greedy)
    return None if exact else f"policy {config.policy} does not promise the same tokens"


def explain_difference(
    target: TargetModel,
    config: SpecdecConfig,
    prompt: str,
    one: Sequence[int],
    other: Sequence[int],
) -> Mapping[str, Any]:
    """The first difference, the scores of both tokens there, and whether they are a tie.

    The score is the logit, and at temperature T > 0 the logit plus T times the noise: the token
    with the larger one should have won. With penalties, or where a text ended, nothing is told.
    """
    found = first_difference(one, other)
    assert found is not None
    position, tokens = found
    where = {"position": position, "token_ids": list(tokens)}
    penalties = (config.repetition_penalty, config.presence_penalty, config.frequency_penalty)
    plain = target.plain()
    if None in tokens or penalties != (1.0, 0.0, 0.0) or plain is None:
        return {**where, "tie": None}
    ids = [*target.tokenizer.encode(prompt), *one[:position]]
    with plain as model:
        scores = row_behind(model, ids).float()
    largest = float(scores.abs().max())
    if config.effective_temperature > 0:
        noise = gumbel_row(config.seed, len(ids), len(scores), PURPOSE_TOKEN, scores.device)
        scores = scores + config.effective_temperature * noise
    judged = judge_tie([float(scores[token]) for token in tokens], largest, target.dtype)
    return {**where, **judged}
