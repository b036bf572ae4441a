"""Conversations as token ids: what people write in them is text, whatever it spells."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

Message = Mapping[str, Any]


class Conversations:
    """What a tokenizer makes of conversations, by its chat template.

    A tokenizer finds the names of special tokens wherever they stand in a text, and so would let a
    message end itself and go on as somebody else. So names in messages are replaced while the
    template is filled in, those of the template by tokens of their own, known to a copy of the
    tokenizer that takes special tokens' names for text. Conversations without names do without.

    Args:
        tokenizer: of transformers, with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = {id_: token for id_, token in added.items() if token.special}
        self._names = _any_of(str(token) for token in self._special.values())
        self._plain: _Plain | None = None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """A conversation up to where the assistant's answer begins.

        Raises:
            ValueError: a message spells a special token, and the tokenizer cannot tell it from one.
        """
        if not any(self._names.search(text) for text in texts_of(messages)):
            ids: list[int] = self._fill_in(messages, tokenize=True, return_dict=False)
            return ids
        if self._plain is None:
            self._plain = _Plain(self._tokenizer, self._special)
        plain = self._plain
        hidden = _mapped(messages, lambda text: self._names.sub(plain.hide, text))
        text = self._names.sub(plain.mark, self._fill_in(hidden, tokenize=False))
        return plain.encode(text)

    def _fill_in(self, messages: Any, **how: bool) -> Any:
        return self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, **how
        )


class _Plain:
    """A copy of a tokenizer for which the names of special tokens are text like any other."""

    def __init__(self, tokenizer: Any, special: Mapping[int, AddedToken]) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        except Exception as error:  # it is written in Python, as a whole or in part
            raise ValueError(
                "a message spells a special token, which this tokenizer cannot take for text"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        names = [str(token) for token in special.values()]
        self._hidden = {name: _unheard_of() for name in names}
        self._name_of = {hidden: name for name, hidden in self._hidden.items()}
        self._all_hidden = _any_of(self._name_of)
        self._marks = {name: _unheard_of() for name in names}
        self._tokenizer.add_tokens([_renamed(t, self._marks[str(t)]) for t in special.values()])
        self._special_id = {
            self._tokenizer.token_to_id(self._marks[str(token)]): id_
            for id_, token in special.items()
        }

    def hide(self, name: re.Match[str]) -> str:
        """What stands for a name in a message."""
        return self._hidden[name[0]]

    def mark(self, name: re.Match[str]) -> str:
        """What stands for a token whose name this is."""
        return self._marks[name[0]]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text in which names are hidden and tokens are marked."""
        text = self._all_hidden.sub(lambda hidden: self._name_of[hidden[0]], text)
        (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        return [self._special_id.get(id_, id_) for id_ in encoding.ids]


def texts_of(value: Any) -> Iterator[str]:
    """All texts in a message, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from texts_of(part)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A message with all its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, change) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(part, change) for part in value]
    return value


def _any_of(texts: Any) -> re.Pattern[str]:
    """Finds texts as tokenizers do: the first, and of those that begin there the longest."""
    found = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)) or "(?!)")


def _unheard_of() -> str:
    """A text that nobody can have written: templates keep private characters as they are."""
    return "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(8))


def _renamed(token: AddedToken, name: str) -> AddedToken:
    """A token that is found in the same way, and is not special."""
    return AddedToken(
        name,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=False,
    )
