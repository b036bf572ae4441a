"""Tokens as an answer names them: in log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from inferlab.models.spelling import Spelling
from inferlab.types import TokenLogprobs

LEAST = -9999.0
"""In place of -inf, which JSON does not have."""


class TokenNames:
    """What ids are called, and log-probabilities under these names.

    Args:
        tokenizer: a Hugging Face tokenizer.
        size: ids of the model.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._spelling = Spelling(tokenizer, size)

    def name(self, token: int) -> str:
        """A token's text; of a special one its name, of a part of a character U+FFFD."""
        special = self._spelling.special.get(token)
        return special if special is not None else self._bytes(token).decode("utf-8", "replace")

    def of_chat(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """``logprobs`` of a choice of a chat completion."""
        content = [
            {
                **self._entry(token, one.logprob),
                "top_logprobs": [self._entry(other, value) for other, value in one.top],
            }
            for token, one in zip(tokens, logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def of_text(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs], offset: int
    ) -> dict[str, Any]:
        """``logprobs`` of a choice of a text completion.

        Args:
            offset: characters before the first of these tokens.
        """
        names = [self.name(token) for token in tokens]
        offsets = []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [max(one.logprob, LEAST) for one in logprobs],
            "top_logprobs": [
                {self.name(other): max(value, LEAST) for other, value in one.top}
                for one in logprobs
            ],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelt = self._bytes(token)
        return {
            "token": self.name(token),
            "logprob": max(logprob, LEAST),
            "bytes": list(spelt) if spelt else None,
        }

    def _bytes(self, token: int) -> bytes:
        pieces = self._spelling.pieces
        return (pieces[token] if token < len(pieces) else None) or b""
