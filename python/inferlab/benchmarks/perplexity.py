"""Perplexity of generated tokens under a model, given their prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from inferlab.baseline import LocalBaselineRunner
from inferlab.benchmarks.measure import Run
from inferlab.models import ForwardBatch, TargetModel, plain_model

_ROWS_AT_ONCE = 128
_PAGE_SIZE = 16


@torch.inference_mode()
def log_probabilities(model: Any, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> list[float]:
    """Natural log-probability of each new token, teacher-forced: one forward over all of them.

    Args:
        model: a Hugging Face causal LM; its logits are taken to fp32 before the log-softmax.
        prompt_ids: the context, at least one token.
        new_ids: the tokens to judge, at least one.

    Raises:
        ValueError: prompt or new tokens are empty.
    """
    if not prompt_ids or not new_ids:
        raise ValueError("prompt and new tokens must hold at least one token each")
    ids = torch.tensor([[*prompt_ids, *new_ids]], device=model.device)
    # Row i predicts token i + 1; the last token predicts nothing that is judged.
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt_ids) - 1 :]
    return _chosen(logits, ids[0, len(prompt_ids) :])


def own_log_probabilities(target: TargetModel, ids: Sequence[int]) -> list[float]:
    """The same of all tokens but the first, by the engine's own forward: with its products, and
    with keys and values as its pages hold them."""
    whole = torch.tensor([list(ids)], device=target.device)
    tokens, pages = whole[:, :-1], -(-len(ids) // _PAGE_SIZE)
    table = torch.arange(pages, dtype=torch.int32, device=target.device)[None]
    positions = torch.arange(tokens.shape[1], device=target.device)[None]
    batch = ForwardBatch(tokens, positions, table.new_zeros(1), table)
    output = target.forward(batch, target.new_cache(pages, _PAGE_SIZE))
    return _chosen(output.logits[0], whole[0, 1:])


def _chosen(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """Log-probabilities of tokens [N] by rows [N, V]."""
    parts = []
    for rows, wanted in zip(logits.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE), strict=True):
        parts.append(rows.float().log_softmax(-1).gather(1, wanted[:, None])[:, 0])
    result: list[float] = torch.cat(parts).tolist()
    return result


@torch.inference_mode()
def text_rows(
    model: Any, ids: Sequence[int], window: int, stride: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of a text that may be longer than the model's context, by a window that slides.

    Every token but the first is predicted once: in the first window all of them, in each further
    one the last ``stride``, which see at least ``window - stride`` tokens before them.

    Args:
        model: a Hugging Face causal LM.
        ids: of the text, at least two.
        window: tokens of a forward, 2 at least and no more than the model's context.
        stride: 1 to window - 1.

    Yields:
        f32[n, V] logits, and the i64[n] tokens that came.

    Raises:
        ValueError: an argument out of range.
    """
    if len(ids) < 2:
        raise ValueError(f"ids has {len(ids)} tokens; a text needs at least two to be predicted")
    if not 1 <= stride < window:
        raise ValueError(f"stride is {stride}; it must be at least 1 and below window ({window})")
    whole = torch.tensor(list(ids), device=model.device)
    begin = seen = 0
    while seen < len(ids) - 1:
        end = min(begin + window, len(ids))
        logits = model(input_ids=whole[None, begin:end], use_cache=False).logits[0]
        # Row i predicts token begin + i + 1; those up to and with `seen` have been predicted.
        rows = slice(seen - begin, end - 1 - begin)
        yield logits[rows].float(), whole[seen + 1 : end]
        seen = end - 1
        begin = max(end + stride - window, begin + 1)


def text_log_probabilities(model: Any, ids: Sequence[int], window: int, stride: int) -> list[float]:
    """Natural log-probability of each token of a text but the first; arguments as `text_rows`."""
    found: list[float] = []
    for logits, wanted in text_rows(model, ids, window, stride):
        found += logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].tolist()
    return found


def perplexity(log_probs: Sequence[float]) -> float:
    """exp of the mean negative log-probability; infinite where a token has probability 0.

    Raises:
        ValueError: no tokens.
    """
    if not log_probs:
        raise ValueError("log_probs must hold at least one value")
    loss = -math.fsum(log_probs) / len(log_probs)
    return math.exp(loss) if loss < 700.0 else math.inf


def add_perplexity(
    runs: Sequence[Run], prompts: Sequence[str], judge: TargetModel | LocalBaselineRunner
) -> dict[str, Any]:
    """Judges the new tokens of each run; its result gets ``perplexity`` and ``perplexity_loss``.

    Args:
        runs: successful ones, with ``token_ids``.
        judge: whose probabilities count; its tokenizer encodes the prompts.

    Returns:
        ``perplexity`` and ``loss`` (mean negative log-probability) over the tokens of all runs,
        ``tokens`` (their number) and ``model``.
    """
    known: dict[tuple[int, tuple[int, ...]], list[float]] = {}
    everything: list[float] = []
    context: AbstractContextManager[Any]
    if isinstance(judge, LocalBaselineRunner):
        name, context = judge.model_name, nullcontext(judge.model)
    else:
        name, context = judge.name, plain_model(judge, "perplexity")
    with context as model:
        for run in runs:
            if run.result is None:
                continue
            ids = tuple(run.result["token_ids"])
            key = (run.prompt_index, ids)
            if key not in known:
                prompt_ids = judge.tokenizer.encode(prompts[run.prompt_index])
                known[key] = log_probabilities(model, prompt_ids, ids)
            run.result["perplexity"] = perplexity(known[key])
            run.result["perplexity_loss"] = -math.fsum(known[key]) / len(ids)
            everything += known[key]
    return {
        "perplexity": perplexity(everything),
        "loss": -math.fsum(everything) / len(everything),
        "tokens": len(everything),
        "model": name,
    }
