"""Do two models speak the same token ids?"""

from __future__ import annotations

from typing import Any

from inferlab.models.base import TargetModel

_PROBE = "Hello, world! def f(x):\n    return x ** 2  # café, 漢字\t1234567890"
_SHOWN = 4


def tokenizer_difference(target: TargetModel, draft: TargetModel) -> str | None:
    """What tells the token ids of two models apart; None where they mean the same.

    Compares vocabularies, special tokens and the ids of a probe text; models without tokenizers
    are compared by the width of their logits. Widths may differ otherwise, as many models pad
    their vocabulary, as long as the tokenizers are the same.

    Raises:
        ValueError: one has no tokenizer, so that it cannot be told.
    """
    if target.tokenizer is None or draft.tokenizer is None:
        if (target.tokenizer, draft.tokenizer) == (None, None):
            if target.vocab_size == draft.vocab_size:
                return None
            why = f"have no tokenizers and {target.vocab_size} and {draft.vocab_size} ids"
        else:
            without = target if target.tokenizer is None else draft
            why = f"cannot be compared: {without.name} has no tokenizer"
        raise ValueError(
            f"{target.name} and {draft.name} {why}; add tokenizer.json to the model's directory, "
            "or use draft_mode 'ngram', which needs no draft model"
        )
    if target.tokenizer is draft.tokenizer:
        return None
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours != theirs:
        return _vocabulary_difference(ours, theirs)
    special, other_special = _special_tokens(target.tokenizer), _special_tokens(draft.tokenizer)
    for role in sorted(special.keys() | other_special.keys()):
        if special.get(role) != other_special.get(role):
            return f"{role} is {special.get(role)!r} and {other_special.get(role)!r}"
    if _probe_ids(target.tokenizer) != _probe_ids(draft.tokenizer):
        return "their vocabularies agree, but they split the same text differently"
    return None


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
