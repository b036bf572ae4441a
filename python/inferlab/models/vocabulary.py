"""Which ids of two tokenizers mean the same text: what lets a draft of another family draft."""

from __future__ import annotations

from typing import Any

import torch

from inferlab.models.base import TargetModel
from inferlab.models.spelling import Spelling


class VocabularyMap:
    """The tokens that a target and a draft have in common.

    Two tokens are the same if they spell the same bytes (see `Spelling`), special ones if they have
    the same role (end of text, ...) or else the same name.

    Args:
        target_tokenizer, draft_tokenizer: Hugging Face tokenizers.
        target_size, draft_size: columns of the models' logits, which may be more than the
            tokenizers have ids; by default they are not.

    Attributes:
        target, draft: what the ids of each spell.
        target_to_draft: [target_size] int32 on the CPU, -1 where the draft has no such token.
        draft_to_target: [draft_size] int32, likewise. It undoes ``target_to_draft``, but where
            several ids spell the same: each leads to the first of them.

    Raises:
        ValueError: one of the tokenizers is missing.
    """

    def __init__(
        self,
        target_tokenizer: Any,
        draft_tokenizer: Any,
        *,
        target_size: int | None = None,
        draft_size: int | None = None,
    ) -> None:
        for whose, tokenizer in (("target", target_tokenizer), ("draft", draft_tokenizer)):
            if tokenizer is None:
                raise ValueError(
                    f"{whose}_tokenizer is None; without tokenizers ids of different vocabularies "
                    "cannot be compared: add tokenizer.json to the model's directory, or take a "
                    "draft with the target's vocabulary"
                )
        self.target = Spelling(target_tokenizer, target_size)
        self.draft = Spelling(draft_tokenizer, draft_size)
        to_draft = _translate(self.target, self.draft)
        to_target = _translate(self.draft, self.target)
        self.target_to_draft = torch.tensor(to_draft, dtype=torch.int32)
        self.draft_to_target = torch.tensor(to_target, dtype=torch.int32)
        self.to_draft: list[int] = to_draft

    @classmethod
    def of(cls, target: TargetModel, draft: TargetModel) -> VocabularyMap:
        """The map between two models' vocabularies.

        Raises:
            ValueError: one of them has no tokenizer.
        """
        for model in (target, draft):
            if model.tokenizer is None:
                raise ValueError(
                    f"{model.name} has no tokenizer, so the ids of {target.name} and {draft.name} "
                    "cannot be compared: add tokenizer.json to the model's directory, or take a "
                    "draft model with the target's vocabulary"
                )
        return cls(
            target.tokenizer,
            draft.tokenizer,
            target_size=target.vocab_size,
            draft_size=draft.vocab_size,
        )

    def shared(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs of the same tokens, one to one: int64 [M] target ids and [M] draft ids."""
        there = self.target_to_draft.long()
        back = self.draft_to_target.long()[there.clamp_min(0)]
        targets = torch.arange(len(there))
        targets = targets[(there >= 0) & (back == targets)]
        return targets, there[targets]

    @property
    def is_whole(self) -> bool:
        """Whether each has all tokens of the other."""
        targets, _ = self.shared()
        return all(
            len(targets) == sum(p is not None for p in side.pieces) + len(side.special)
            for side in (self.target, self.draft)
        )

    @property
    def coverage(self) -> float:
        """Share of the target's tokens that the draft has too."""
        tokens = sum(p is not None for p in self.target.pieces) + len(self.target.special)
        return int((self.target_to_draft >= 0).sum()) / max(tokens, 1)


def _translate(source: Spelling, other: Spelling) -> list[int]:
    """For each id of one tokenizer the other's id of the same meaning, or -1."""
    table = [other.ids.get(piece, -1) if piece else -1 for piece in source.pieces]
    names = {name: id_ for id_, name in other.special.items()}
    for id_, name in source.special.items():
        table[id_] = names.get(name, -1)
    # The first role counts: where the end of text is also the beginning, it is met as the end.
    for role in reversed([role for role in source.roles if role in other.roles]):
        table[source.roles[role]] = other.roles[role]
    return table
