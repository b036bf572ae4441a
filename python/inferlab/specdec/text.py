"""The text that new tokens add to a prompt, and the stop strings in it."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

Decode = Callable[[list[int]], str]

_INCOMPLETE = "\ufffd"  # what a character decodes to as long as it lacks bytes
_CONTEXT_TOKENS = 16
_SETTLE_EVERY = 17  # tokens; prime to 2, 3 and 4, the bytes of characters
_OPEN_CHARACTERS = 8  # at least so many stand behind what is settled


class NewText:
    """What tokens add to a prompt: its text and this one are the text of all tokens.

    Tokens alone may decode to something else: Sentencepiece and Metaspace tokenizers drop the blank
    before the first token of a text, and a character may begin in the prompt. So the last tokens of
    the prompt are decoded with them and cut off. A character that the prompt leaves incomplete
    belongs to the new text.

    Args:
        decode: from token ids to text, special tokens left out.
        prompt: its token ids.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        self.decode = decode
        count = _CONTEXT_TOKENS
        while True:
            self.context = list(prompt[-count:])
            self.before = decode(self.context)
            # It must have text, and begin with a whole character.
            if count >= len(prompt) or self.before.strip(_INCOMPLETE + " \n") == self.before != "":
                break
            count *= 2

    def of(self, tokens: list[int]) -> str:
        """The text that ``tokens`` add."""
        text = self.decode(self.context + tokens)
        for before in (self.before, self.before.rstrip(_INCOMPLETE)):
            if text.startswith(before):
                return text[len(before) :]
        return self.decode(tokens)


class StopStrings:
    """Finds the first token after which the text of the new tokens contains a stop string.

    Tokens may add nothing to the text, or change what is before them, so the text is decoded anew
    at each token, from where it is certain not to change: behind what is settled, which is checked
    to be a cut that decoding does not notice. Where what is settled changes all the same (a run of
    byte tokens that became invalid), the whole text is decoded.

    A special token has no text, but a stop string that is a special token's name means that token.

    Args:
        strings: the stop strings, none of them empty.
        text: of the prompt.
        special: names of the special tokens by id, all of which ``text.decode`` leaves out.
        min_tokens: a stop string counts that ends in the text behind so many new tokens.
    """

    def __init__(
        self,
        strings: Sequence[str],
        text: NewText,
        special: dict[int, str] | None = None,
        min_tokens: int = 0,
    ) -> None:
        self._strings = tuple(strings)
        self._longest = max(map(len, strings))
        self._text = text
        self._special = special or {}
        self._min_tokens = min_tokens
        self._count = 0
        self._floor = 0  # stop strings end behind so many characters
        # ids[start:settled] are decoded as context of the rest; their text is `head`.
        self._ids = list(text.context)
        self._start = 0
        self._settled = self._first_new = len(self._ids)
        self._head = text.before
        self._tail = ""  # the last settled characters: a stop string may begin there
        self._tail_at = 0  # where they begin
        self._next_settling = self._settled + _SETTLE_EVERY

    def add(self, token: int) -> bool:
        """Takes the next new token; whether a stop string is complete with it."""
        self._count += 1
        counts = self._count > self._min_tokens
        if token in self._special:
            if self._count == self._min_tokens:
                self._set_floor()
            return counts and self._special[token] in self._strings
        self._ids.append(token)
        if self._count < self._min_tokens:
            return False
        if self._count == self._min_tokens:
            self._set_floor()
            return False
        window = self._decode_from(self._start)
        newest, at = self._newest(window)
        if self._find(newest, at) is not None:
            return True
        if len(self._ids) >= self._next_settling:
            self._settle(window)
        return False

    def cut(self, text: str) -> str:
        """The text before the first stop string."""
        return text[: self._find(text, 0)]

    def _set_floor(self) -> None:
        text = self._text.of(self._ids[self._first_new :])
        self._floor = len(text.rstrip(_INCOMPLETE))

    def _newest(self, window: str) -> tuple[str, int]:
        """The newest text, with as much before it as a stop string may need, and where it begins.

        Args:
            window: the text of ids[start:].
        """
        if not window.startswith(self._head):
            whole = self._head.rstrip(_INCOMPLETE)
            if self._settled > self._first_new or not window.startswith(whole):
                return self._text.of(self._ids[self._first_new :]), 0
            self._head = whole  # the prompt's last character is complete now
        return self._tail + window[len(self._head) :], self._tail_at

    def _find(self, text: str, at: int) -> int | None:
        """Where in ``text``, which begins at character ``at``, the first stop string stands."""
        starts = [text.find(s, max(self._floor - len(s) + 1 - at, 0)) for s in self._strings]
        return min((start for start in starts if start >= 0), default=None)

    def _settle(self, window: str) -> None:
        """Moves the context on to where decoding from there gives the same text, if it can."""
        self._next_settling = len(self._ids) + _SETTLE_EVERY
        middle = (self._settled + len(self._ids)) // 2
        # Of four places one is not inside a character.
        for place in range(middle, middle + 4):
            if self._settle_at(place, window):
                break

    def _settle_at(self, place: int, window: str) -> bool:
        """Settles ids[:place], if the text allows it."""
        done = self._text.decode(self._ids[self._start : place])
        rest = window[len(done) :]
        if not (
            window.startswith(done)
            and done.startswith(self._head)
            and len(rest) >= _OPEN_CHARACTERS
        ):
            return False
        head = self._text.decode(self._ids[self._settled : place])
        if not head.strip() or self._decode_from(self._settled) != head + rest:
            return False
        text = self._tail + done[len(self._head) :]
        keep = min(len(text), self._longest - 1)
        self._tail_at += len(text) - keep
        self._tail = text[len(text) - keep :]
        self._start, self._settled, self._head = self._settled, place, head
        return True

    def _decode_from(self, start: int) -> str:
        return self._text.decode(self._ids[start:])


def text_decoder(tokenizer: Any) -> Decode:
    """Decodes as results do: without special tokens; without a tokenizer there is no text."""

    def decode(ids: list[int]) -> str:
        if tokenizer is None:
            return ""
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    return decode


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Names by id of the tokens that `text_decoder` leaves out."""
    added = {id_: str(t) for id_, t in tokenizer.added_tokens_decoder.items() if t.special}
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    decode = text_decoder(tokenizer)
    return {id_: name for id_, name in (added | dict(named)).items() if decode([id_]) == ""}


def unsettled_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids behind which a run of byte tokens may go on, whose text is decoded as a whole: the byte
    tokens of a tokenizer that spells what it does not know, and special ones, which have no text.
    """
    if tokenizer is None:
        return frozenset()
    vocabulary = tokenizer.get_vocab()
    names = (f"<0x{byte:02X}>" for byte in range(256))
    spelt = [vocabulary[name] for name in names if name in vocabulary]
    return frozenset((*spelt, *special_tokens(tokenizer))) if spelt else frozenset()


class TextStream:
    """The text of new tokens as it grows, in pieces that are never taken back.

    What may still change is kept back: a character that lacks bytes, a run of byte tokens, which a
    wrong one at its end makes invalid as a whole, and an end that may turn out to be the beginning
    of a stop string. All pieces together are the text of the result.

    Args:
        text: of the prompt.
        stop: the stop strings of the request.
        unsettled: ids behind which the text before them may still change (see `unsettled_tokens`).
    """

    def __init__(
        self, text: NewText, stop: Sequence[str] = (), unsettled: Container[int] = ()
    ) -> None:
        self._text = text
        self._stop = tuple(stop)
        self._unsettled = unsettled
        self._ids = list(text.context)
        self._start = 0  # what comes is decoded behind ids[start:shown]
        self._shown = len(self._ids)
        self._head = text.before  # the text of these
        self._open = ""  # text that may be the beginning of a stop string
        self._given = 0  # characters handed out

    def add(self, tokens: Sequence[int]) -> str:
        """Takes new tokens; the text that is certain with them."""
        self._ids += tokens
        if self._ids[-1] in self._unsettled:
            return ""
        window = self._text.decode(self._ids[self._start :])
        if not self._given and not window.startswith(self._head):
            self._head = self._head.rstrip(_INCOMPLETE)  # the prompt's last character
        if window.endswith(_INCOMPLETE) or not window.startswith(self._head):
            return ""
        whole = self._open + window[len(self._head) :]
        self._head = window
        newest = self._text.decode(self._ids[self._shown :])
        if newest.strip() and window.endswith(newest):  # what follows needs no more of the context
            self._start, self._head = self._shown, newest
        self._shown = len(self._ids)
        self._open = whole[len(whole) - self._held(whole) :]
        return self._give(whole[: len(whole) - len(self._open)])

    def end(self, text: str) -> str:
        """What is left to hand out when the request has ended with this text."""
        return self._give(text[self._given :])

    def _give(self, text: str) -> str:
        self._given += len(text)
        return text

    def _held(self, text: str) -> int:
        """Characters at the end of ``text`` with which a stop string begins."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
