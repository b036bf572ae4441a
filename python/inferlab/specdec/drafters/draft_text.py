"""A sequence as a draft model of another vocabulary reads it."""

from __future__ import annotations

from collections.abc import Sequence

from inferlab.models import VocabularyMap
from inferlab.models.spelling import ends_inside_character

# A text without spaces is cut all the same, lest its end is encoded anew with every token.
LONGEST_CHUNK = 256


class DraftText:
    """The draft's ids of a growing target text.

    The text is taken chunk by chunk; a chunk is a word with the space before it, as nearly all
    tokenizers cut texts there. A chunk whose tokens the draft all knows becomes the draft's ids for
    them, any other is spelt out and encoded by the draft's tokenizer. Only the last chunk can
    still change.

    Attributes:
        ids: draft ids of all target tokens so far.
        cached: draft ids whose K/V lies in the draft's cache, in the order of its slots.
        pages: of the draft's cache.
        drafted: levels of the tree that was drafted last, 0 for none.
        asleep: the sequence moved on without a draft.
    """

    def __init__(self, vocabulary: VocabularyMap) -> None:
        self.ids: list[int] = []
        self.cached: list[int] = []
        self.pages: list[int] = []
        self.drafted = 0
        self.asleep = True
        self._vocabulary = vocabulary
        self._read = 0  # target tokens taken in
        self._chunk: list[int] = []  # target tokens of the last chunk
        self._bytes = b""  # what they spell
        self._chunk_start = 0  # where it begins in ids
        self._unchanged = 0  # ids before this are as they were when they were compared last

    def update(self, tokens: Sequence[int], *, spelt: bool = False) -> None:
        """Takes in what was added to the target's tokens.

        Args:
            spelt: encode new chunks as the draft's tokenizer does, also where all tokens are known.
        """
        vocabulary = self._vocabulary
        for index in range(self._read, len(tokens)):
            token = tokens[index]
            piece = vocabulary.target.pieces[token]
            if piece is None:
                self._close(spelt)
                self._special(token, at_start=index == 0)
                continue
            if index == 0:
                self._special(None, at_start=True)
            if self._is_cut(piece):
                self._close(spelt)
            self._chunk.append(token)
            self._bytes += piece
        self._read = len(tokens)
        self.ids[self._chunk_start :] = self._encoded_chunk(spelt)

    @property
    def length(self) -> int:
        """Target tokens taken in."""
        return self._read

    def reuse(self) -> None:
        """Forgets the K/V that no longer fits; the last id's is always made anew."""
        count = min(self._unchanged, len(self.cached))
        most = min(len(self.cached), len(self.ids) - 1)
        while count < most and self.cached[count] == self.ids[count]:
            count += 1
        del self.cached[min(count, most) :]
        self._unchanged = self._chunk_start

    def accepted(self, tokens: Sequence[int]) -> None:
        """Target tokens of a drafted tree that were accepted and whose K/V is kept."""
        self.cached += [self._vocabulary.to_draft[token] for token in tokens]

    def continued(self, drafted: Sequence[int], most: int) -> list[int]:
        """Target tokens of a text that the draft has written on.

        The last chunk and the new text are encoded together by the target's tokenizer; what comes
        behind the chunk's own tokens is the draft. Where none of its tokens begins there, the new
        text is cut into the longest tokens that spell it.

        Args:
            drafted: draft ids; at a special token the text ends.
            most: tokens to return at most.
        """
        vocabulary = self._vocabulary
        pieces = vocabulary.draft.pieces
        end = next((i for i, id_ in enumerate(drafted) if pieces[id_] is None), len(drafted))
        new = vocabulary.draft.spell(list(drafted[:end]))
        found: list[int] = []
        if new:
            whole = list(vocabulary.target.encode(self._bytes + new))
            start = self._aligned(whole)
            found = vocabulary.target.longest_match(new) if start is None else whole[start:]
        if end < len(drafted):
            special = int(vocabulary.draft_to_target[drafted[end]])
            found += [special] if special >= 0 else []
        return found[:most]

    def _aligned(self, whole: list[int]) -> int | None:
        """Where in ids of the last chunk and more the chunk ends; None: inside a token."""
        if whole[: len(self._chunk)] == self._chunk:
            return len(self._chunk)
        length = 0
        for index, id_ in enumerate(whole):
            if length >= len(self._bytes):
                return index if length == len(self._bytes) else None
            length += len(self._vocabulary.target.pieces[id_] or b"")
        return None

    def _is_cut(self, piece: bytes) -> bool:
        """Whether a new chunk begins with ``piece``."""
        if not self._bytes:
            return False
        if piece[:1] == b" " and piece[1:2].strip() and self._bytes[-1:].strip():
            return True
        return len(self._bytes) > LONGEST_CHUNK and not ends_inside_character(self._bytes)

    def _close(self, spelt: bool) -> None:
        self.ids[self._chunk_start :] = self._encoded_chunk(spelt)
        self._chunk_start = len(self.ids)
        self._chunk, self._bytes = [], b""

    def _encoded_chunk(self, spelt: bool) -> list[int]:
        ids = [self._vocabulary.to_draft[token] for token in self._chunk]
        return list(self._vocabulary.draft.encode(self._bytes)) if spelt or -1 in ids else ids

    def _special(self, token: int | None, at_start: bool) -> None:
        """A special token of the target; in front of the text the draft has its own."""
        vocabulary = self._vocabulary
        ids: list[int] = []
        if at_start:
            ids += vocabulary.draft.prefix
        begins = at_start and token == vocabulary.target.roles.get("bos")
        if token is not None and not (begins and ids) and vocabulary.to_draft[token] >= 0:
            ids.append(vocabulary.to_draft[token])
        self.ids += ids
        self._chunk_start = len(self.ids)
