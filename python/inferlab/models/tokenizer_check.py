"""Do two models speak the same token ids? Speculation compares ids, so they must."""

from __future__ import annotations

from typing import Any, NoReturn

from inferlab.models.base import TargetModel

_PROBE = "Hello, world! def f(x):\n    return x ** 2  # café, 漢字\t1234567890"
_SHOWN = 4


def check_same_tokenizer(target: TargetModel, draft: TargetModel) -> None:
    """Refuses a draft whose token ids mean something else than the target's.

    Compares vocabularies, special tokens and the ids of a probe text; models without tokenizers
    are compared by the width of their logits. Widths may differ otherwise, as many models pad
    their vocabulary, as long as the tokenizers are the same.

    Raises:
        ValueError: says what differs and what to do about it.
    """
    if target.tokenizer is None or draft.tokenizer is None:
        if target.tokenizer is None and draft.tokenizer is None:
            if target.vocab_size != draft.vocab_size:
                _refuse(
                    target,
                    draft,
                    f"they have no tokenizers and {target.vocab_size} and {draft.vocab_size} ids",
                )
            return
        without = target if target.tokenizer is None else draft
        _refuse(target, draft, f"{without.name} has no tokenizer to compare")
    if target.tokenizer is draft.tokenizer:
        return
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours != theirs:
        _refuse(target, draft, _vocabulary_difference(ours, theirs))
    special, other_special = _special_tokens(target.tokenizer), _special_tokens(draft.tokenizer)
    for role in sorted(special.keys() | other_special.keys()):
        if special.get(role) != other_special.get(role):
            _refuse(
                target,
                draft,
                f"{role} is {special.get(role)!r} and {other_special.get(role)!r}",
            )
    if _probe_ids(target.tokenizer) != _probe_ids(draft.tokenizer):
        _refuse(target, draft, "their vocabularies agree, but they split the same text differently")


def _vocabulary_difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    parts = [f"{len(ours)} and {len(theirs)} tokens"]
    moved = sorted((ours[t], t) for t in ours.keys() & theirs.keys() if ours[t] != theirs[t])
    if moved:
        shown = ", ".join(f"{t!r} is {i} and {theirs[t]}" for i, t in moved[:_SHOWN])
        parts.append(f"{len(moved)} tokens have different ids ({shown})")
    only = sorted((ours[t], t) for t in ours.keys() - theirs.keys())
    if only:
        shown = ", ".join(repr(t) for _, t in only[:_SHOWN])
        parts.append(f"{len(only)} are in the target only ({shown})")
    only = sorted((theirs[t], t) for t in theirs.keys() - ours.keys())
    if only:
        shown = ", ".join(repr(t) for _, t in only[:_SHOWN])
        parts.append(f"{len(only)} are in the draft only ({shown})")
    return "; ".join(parts)


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    # Not the padding token: nothing here ever pads a text.
    return {
        role: getattr(tokenizer, role, None) for role in ("bos_token", "eos_token", "unk_token")
    }


def _probe_ids(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.encode(_PROBE)
    return ids


def _refuse(target: TargetModel, draft: TargetModel, why: str) -> NoReturn:
    raise ValueError(
        f"{target.name} and {draft.name} have different tokenizers: {why}. A draft model must use "
        "its target's tokenizer: take a smaller model of the same family, or draft_mode 'ngram', "
        "which needs no draft model"
    )
