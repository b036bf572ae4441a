"""Made-up conversations of asked numbers of tokens: what was asked is what is sent.

Texts are words that a tokenizer has as one token each, drawn from a seed; every text is tokenised
again before it is given away. Lengths are of what users say: what a server puts around it, a
beginning-of-text token or a chat template, comes on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from inferlab.errors import UsageError
from inferlab.lengths import Lengths
from inferlab.load.conversations import Conversation, Turn

# What draws are for: texts of one conversation, and beginnings that several share.
OWN, SHARED = 0, 1

_CHUNK = 4096  # ids looked at between two counts of the words that were found
_ENOUGH = 2048  # words
_FEW = 16  # words that are not enough to do without others
_GLUED = 128  # words at most where none stands between them: all pairs are tried
_SAMPLE = 8000  # words of the text that is tried where a space does


class Writer:
    """Writes texts of exactly so many tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        name: of its model, for messages.
        seed: of all that is drawn.

    Raises:
        UsageError: the tokenizer has no words that stay single tokens among others.
    """

    def __init__(self, tokenizer: Any, name: str = "the tokenizer", seed: int = 0) -> None:
        if seed < 0:
            raise UsageError(f"seed: {seed} is not allowed; must be at least 0")
        self._tokenizer = tokenizer
        self._name = name
        self._seed = seed
        self._between = " "
        self._find_words()
        self._drop_unsteady()

    def tokens(self, text: str) -> int:
        """How many tokens a text has, special ones that may go around it not counted."""
        return len(self._ids([text])[0])

    def draws(self, count: int, *key: int) -> np.ndarray:
        """Random numbers for ``count`` tokens; the same for the same seed and key."""
        random = np.random.default_rng([self._seed, *key])
        return random.integers(0, 1 << 32, count, dtype=np.uint64)

    def text(self, draws: np.ndarray) -> str:
        """A text of one token for each number of ``draws``; the same numbers give the same tokens
        at any place but the first.

        Raises:
            UsageError: ``draws`` is empty, or tokenising the text anew gives other tokens.
        """
        if not len(draws):
            raise UsageError("a text must have at least one token")
        text, expected = self._spell(draws)
        found = self._ids([text])[0]
        if found != expected:
            raise UsageError(
                f"{self._name}: a text that should have {len(draws)} tokens has {len(found)}, or "
                "others than it was made from; try another seed, or give real prompts"
            )
        return text

    def _spell(self, draws: np.ndarray) -> tuple[str, list[int]]:
        """What draws stand for: the text, and its ids."""
        first = self._firsts[int(draws[0]) % len(self._firsts)]
        words = [first, *(self._words[i] for i in (draws[1:] % len(self._words)).tolist())]
        return self._between.join(word for word, _ in words), [id_ for _, id_ in words]

    def _find_words(self) -> None:
        """Sets what texts are made of: words with their ids, at the first place and behind it."""
        candidates = self._candidates()
        alone = self._single(candidates, [], "")
        if not alone:
            raise UsageError(
                f"{self._name}: no word of its vocabulary is a single token, so that no text of an "
                "asked length can be made; give real prompts"
            )
        lead = next(iter(alone.items()))
        behind = self._single(candidates, [lead[1]], lead[0] + " ")
        if len(behind) < 2:  # a vocabulary that does not know words with a space in front
            self._between = ""
            behind = self._single(candidates, [lead[1]], lead[0])
            behind = dict(list(behind.items())[:_GLUED])
        if len(behind) < 2:
            raise UsageError(
                f"{self._name}: its words do not stay single tokens behind one another, so that no "
                "text of an asked length can be made; give real prompts"
            )
        both = [word for word in behind if word in alone]
        if len(both) >= _FEW:
            self._firsts = [(word, alone[word]) for word in both]
            self._words = [(word, behind[word]) for word in both]
        else:
            self._firsts, self._words = list(alone.items()), list(behind.items())

    def _candidates(self) -> list[str]:
        """Words of the vocabulary, without spaces around them; ASCII alone if there are enough."""
        ids = sorted(
            set(self._tokenizer.get_vocab().values()) - set(self._tokenizer.all_special_ids)
        )
        ids = np.random.default_rng(0).permutation(ids).tolist()
        found: dict[str, None] = {}
        for start in range(0, len(ids), _CHUNK):
            texts = self._tokenizer.batch_decode([[id_] for id_ in ids[start : start + _CHUNK]])
            found.update((text.strip(), None) for text in texts if text.strip().isalpha())
            if sum(map(str.isascii, found)) >= _ENOUGH:
                break
        plain = [word for word in found if word.isascii()]
        return plain if len(plain) >= _FEW else list(found)

    def _single(self, words: list[str], before: list[int], lead: str) -> dict[str, int]:
        """Those words that add one token to a text, with its id."""
        rows = self._ids([lead + word for word in words]) if words else []
        return {
            word: row[-1]
            for word, row in zip(words, rows, strict=True)
            if len(row) == len(before) + 1 and row[:-1] == before
        }

    def _drop_unsteady(self) -> None:
        """Drops words that merge with others, until a long text keeps its tokens.

        Words with a space between them are tokenised apart by nearly all tokenizers. Others merge,
        and in byte-pair encoding two neighbours do so whatever stands around them.
        """
        while len(self._words) > 1:
            text, expected = self._spell(self._trial())
            found = self._ids([text])[0]
            if found == expected:
                break
            pairs = enumerate(zip(expected, found, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(found)) - 1)
            unsteady = set(expected[max(at, 1) : at + 2])
            self._words = [word for word in self._words if word[1] not in unsteady]
        if not self._between:
            steady = {word for word, _ in self._words}
            self._firsts = [first for first in self._firsts if first[0] in steady]
        if len(self._words) < 2 or not self._firsts:
            raise UsageError(
                f"{self._name}: its words change when they stand behind one another, so that no "
                "text of an asked length can be made; give real prompts"
            )

    def _trial(self) -> np.ndarray:
        """Draws of a text in which words stand behind one another: all pairs, or many."""
        if self._between:
            return np.random.default_rng(1).integers(0, 1 << 32, _SAMPLE, np.uint64)
        count = len(self._words)
        return np.indices((count, count), np.uint64).reshape(2, -1).T.ravel()

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids


@dataclass(frozen=True)
class Synthetic:
    """A set of conversations to be made.

    Attributes:
        conversations: how many.
        inputs: tokens of each turn.
        outputs: tokens of each answer, at most; a server that is not told to ignore the end of a
            text may write fewer.
        turns: of each conversation.
        groups: of conversations that begin alike, all of about one size, in mixed order; 0: none.
        prefix: tokens that the first turns of a group begin with, on top of ``inputs``.
    """

    conversations: int
    inputs: Lengths
    outputs: Lengths
    turns: int = 1
    groups: int = 0
    prefix: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("conversations", self.conversations, 1),
            ("turns", self.turns, 1),
            ("groups", self.groups, 0),
            ("prefix", self.prefix, 0),
        ):
            if value < least:
                raise UsageError(f"{name}: {value} is not allowed; must be at least {least}")
        if (self.groups > 0) != (self.prefix > 0):
            raise UsageError(
                f"groups and prefix: {self.groups} and {self.prefix} do not go together; give how "
                "many groups begin alike and of how many tokens their beginnings are, or neither"
            )


def make_conversations(wanted: Synthetic, writer: Writer) -> list[Conversation]:
    """Conversations of the writer's words; the same for the same seed.

    Ids are numbers, with the group in front where there are groups: ``group-2/17``.

    Raises:
        UsageError: a text that cannot be made with the writer's tokenizer.
    """
    shape = (wanted.conversations, wanted.turns)
    total = wanted.conversations * wanted.turns
    inputs = wanted.inputs.draw(total, _random(writer, 0)).reshape(shape)
    outputs = wanted.outputs.draw(total, _random(writer, 1)).reshape(shape)
    groups = np.arange(wanted.conversations) % max(wanted.groups, 1)
    groups = _random(writer, 2).permutation(groups)
    made = []
    for number in range(wanted.conversations):
        turns = []
        for turn in range(wanted.turns):
            draws = writer.draws(int(inputs[number, turn]), OWN, number, turn)
            if wanted.groups and turn == 0:
                prefix = writer.draws(wanted.prefix, SHARED, int(groups[number]))
                draws = np.concatenate([prefix, draws])
            turns.append(Turn(writer.text(draws), int(outputs[number, turn])))
        id_ = f"group-{groups[number]}/{number}" if wanted.groups else number
        made.append(Conversation(tuple(turns), id_))
    return made


def _random(writer: Writer, what: int) -> np.random.Generator:
    return np.random.default_rng(writer.draws(4, 2, what))
