"""What a tokenizer's ids spell: their bytes, however the tokenizer writes spaces and bytes.

Vocabularies of different kinds write the same text differently: " the" is ``Ġthe`` in byte-level
BPE, ``▁the`` in sentencepiece and ``the`` in WordPiece, where a piece inside a word is ``##the``.
As bytes they can be compared, cut and joined.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

# Ids of one role are compared by the role: what they are called differs from family to family.
ROLES = ("eos", "bos", "pad", "unk", "sep", "cls", "mask")

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_SENTENCEPIECE_SPACE = "\u2581"


class Spelling:
    """Ids to bytes and bytes to ids, for one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        size: ids that its model has, which may be more or fewer; by default the tokenizer's.

    Attributes:
        pieces: by id, the bytes that it adds to a text; None for special tokens and for ids
            without a token. Words carry the space before them.
        special: special tokens, by id.
        roles: ids by role ("eos", "bos", ...), where the tokenizer has one.
        ids: the id of each piece; where several spell the same, a proper token comes before a
            byte token and a low id before a high one.
        prefix: special ids that the tokenizer puts before every text.
    """

    def __init__(self, tokenizer: Any, size: int | None = None) -> None:
        self._tokenizer = tokenizer
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        added = tokenizer.added_tokens_decoder
        self.special: dict[int, str] = {i: str(t) for i, t in added.items() if t.special}
        self.roles: dict[str, int] = {}
        for role in ROLES:
            id_ = getattr(tokenizer, f"{role}_token_id", None)
            if id_ is not None:
                self.roles[role] = id_
                self.special.setdefault(id_, str(getattr(tokenizer, f"{role}_token")))
        if size is None:
            size = max([*vocabulary.values(), *added], default=-1) + 1
        self.special = {id_: name for id_, name in self.special.items() if id_ < size}
        self.roles = {role: id_ for role, id_ in self.roles.items() if id_ < size}
        self.pieces: list[bytes | None] = [None] * size
        read = _reader(tokenizer, vocabulary)
        byte_tokens = set()
        for token, id_ in vocabulary.items():
            if id_ < size and id_ not in self.special:
                self.pieces[id_] = token.encode() if id_ in added else read(token)
                if _BYTE_TOKEN.match(token):
                    byte_tokens.add(id_)
        self.ids: dict[bytes, int] = {}
        for id_ in sorted(range(size), key=lambda id_: (id_ in byte_tokens, id_)):
            piece = self.pieces[id_]
            if piece:
                self.ids.setdefault(piece, id_)
        self._longest = max(map(len, self.ids), default=0)
        alone = self._raw_ids("a")
        # Sentencepiece and WordPiece put a space before a text, some also where there is one.
        self._adds_space = self.spell(alone[:1]).startswith(b" ")
        self._doubles_space = self.spell(self._raw_ids(" a")).startswith(b"  ")
        self.prefix = self._find_prefix(alone)
        # Texts come back word by word: most of them are words that were there before.
        self.encode: Callable[[bytes], tuple[int, ...]] = lru_cache(maxsize=16384)(self._encode)

    def spell(self, ids: list[int]) -> bytes:
        """The bytes of a run of ids; special ones add none."""
        return b"".join(self.pieces[id_] or b"" for id_ in ids)

    def longest_match(self, data: bytes) -> list[int]:
        """Ids that spell ``data`` exactly, each the longest that fits, up to where none does."""
        found, at = [], 0
        while at < len(data):
            for end in range(min(len(data), at + self._longest), at, -1):
                id_ = self.ids.get(data[at:end])
                if id_ is not None:
                    found.append(id_)
                    at = end
                    break
            else:
                break
        return found

    def _encode(self, data: bytes) -> tuple[int, ...]:
        """The tokenizer's own ids for a piece of text (the public ``encode``, without its cache).

        A character that is not complete yet becomes its bytes' ids where there are such, else it
        is left out.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(data)
        rest = decoder.getstate()[0]
        if text == " " and b" " in self.ids:
            ids = [self.ids[b" "]]
        else:
            spare = self._doubles_space or (self._adds_space and bool(text[1:2].strip()))
            ids = self._raw_ids(text[1:] if spare and text[:1] == " " else text)
        tail = [self.ids.get(rest[i : i + 1]) for i in range(len(rest))]
        return (*ids, *(id_ for id_ in tail if id_ is not None and None not in tail))

    def _raw_ids(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return [id_ for id_ in ids if id_ < len(self.pieces)]

    def _find_prefix(self, alone: list[int]) -> tuple[int, ...]:
        framed = self._tokenizer.encode("a", verbose=False)
        starts = range(len(framed) - len(alone) + 1)
        start = next((i for i in starts if framed[i : i + len(alone)] == alone), 0)
        return tuple(id_ for id_ in framed[:start] if id_ in self.special)


def ends_inside_character(data: bytes) -> bool:
    """Whether the last UTF-8 character of a text lacks bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return bool(decoder.getstate()[0])


def _reader(tokenizer: Any, vocabulary: dict[str, int]) -> Callable[[str], bytes]:
    """From a token as the vocabulary writes it to its bytes."""
    steps = _decoder_steps(tokenizer, vocabulary)
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        return _byte_level
    for step in steps:
        if step["type"] == "WordPiece":
            return partial(_word_piece, inside=step.get("prefix", "##"))
        if step["type"] == "BPEDecoder":
            return partial(_replaced, mark=step.get("suffix", "</w>"))
        space = step.get("replacement") if step["type"] == "Metaspace" else None
        if step["type"] == "Replace" and step.get("content") == " ":
            space = step["pattern"].get("String")
        if space:
            read = partial(_replaced, mark=space)
            return partial(_byte_or, read) if "ByteFallback" in kinds else read
    if not steps:
        # Without a decoder tokens are joined by spaces.
        return lambda token: b" " + token.encode()
    return str.encode


def _decoder_steps(tokenizer: Any, vocabulary: dict[str, int]) -> list[dict[str, Any]]:
    """What the tokenizer does to turn tokens into text, as `tokenizers` writes it down."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        # A tokenizer in Python does not say: by what its vocabulary looks like.
        if any(token.startswith(_SENTENCEPIECE_SPACE) for token in vocabulary):
            return [{"type": "ByteFallback"}, {"type": "Metaspace", "replacement": "\u2581"}]
        if any(token.startswith("\u0120") for token in vocabulary):
            return [{"type": "ByteLevel"}]
        inside = any(token.startswith("##") for token in vocabulary)
        return [{"type": "WordPiece"}] if inside else [{"type": "Fuse"}]
    if backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    return steps


def byte_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte (GPT-2's mapping)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(moved)) for byte in range(256)]


_BYTE_OF = {character: bytes([byte]) for byte, character in enumerate(byte_alphabet())}


def _byte_level(token: str) -> bytes:
    return b"".join(_BYTE_OF.get(character) or character.encode() for character in token)


def _replaced(token: str, mark: str) -> bytes:
    return token.replace(mark, " ").encode()


def _byte_or(read: Callable[[str], bytes], token: str) -> bytes:
    byte = _BYTE_TOKEN.match(token)
    return bytes([int(byte[1], 16)]) if byte else read(token)


def _word_piece(token: str, inside: str) -> bytes:
    if token.startswith(inside):
        return token.removeprefix(inside).encode()
    # Punctuation is a word to WordPiece, but in a text it mostly follows without a space.
    return token.encode() if len(token) == 1 and not token.isalnum() else b" " + token.encode()
