"""Grammars: texts that are JSON of a schema, match a regular expression, or are one of several.

What a grammar allows behind a text is worked out by llguidance, token by token.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from inferlab.models import TargetModel
from inferlab.models.spelling import Spelling
from inferlab.scheduler import NodeMasks
from inferlab.specdec.text import NewText, text_decoder
from inferlab.types import SamplingParams, check_text

MAX_CHARACTERS = 2**17
"""Of a grammar's text."""
MAX_MULTIPLE = 10_000
"""Largest common multiple of all ``multipleOf`` of a schema: remainders are states of an automaton,
made when the grammar is compiled, which the library does not bound."""
WHITESPACE = r"( |\n[ \t]{0,20})?"
"""Between the parts of a JSON text: none, a blank, or a new line and its indentation. Without a
bound small models write blanks for ever; the library repeats what it is given before 1.8."""
KEPT = 64
"""Compiled grammars that are kept."""
# Without it the library allows only its own choice of tokens for text that is certain to come.
_OPTIONS = '%llguidance {"no_forcing": true}'
_MOST_DIGITS = 20
_SAMPLE = '{"a b": [1.5, "x"], "c": null}'


class GrammarError(ValueError):
    """A grammar that cannot be used, or a text that does not fit it."""


@dataclass(frozen=True)
class Grammar:
    """What a generated text may be; made by one of the functions below.

    Attributes:
        kind: how ``text`` is to be read.
        text: a JSON schema, a regular expression, or a JSON list of texts.
    """

    kind: Literal["json_schema", "regex", "choice"]
    text: str

    def __post_init__(self) -> None:
        if len(self.text) > MAX_CHARACTERS:
            raise GrammarError(
                f"{self.kind} has {len(self.text)} characters; at most {MAX_CHARACTERS} are allowed"
            )
        check_text(self.kind, self.text)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that is valid under a schema, given as such or as its text.

        Properties come in the schema's order. Between the parts of the text is at most one blank,
        or a new line and its indentation.

        Raises:
            GrammarError: it is not JSON, or too long.
        """
        try:
            if isinstance(schema, str):
                schema = json.loads(schema)
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"json_schema is not a JSON document: {error}") from error
        if not isinstance(schema, Mapping):
            raise GrammarError(f"json_schema is {text[:60]}; it must be an object")
        return cls("json_schema", text)

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Texts that a regular expression matches as a whole (Rust's syntax: no look-around, no
        back-references)."""
        if not isinstance(pattern, str) or not pattern:
            raise GrammarError(f"regex is {pattern!r}; it must be a text that is not empty")
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Grammar:
        """One of several texts."""
        proper = not isinstance(texts, str) and all(isinstance(t, str) and t for t in texts)
        if not proper or not texts:
            raise GrammarError(f"choice is {str(texts)[:60]}; it must be texts that are not empty")
        return cls("choice", json.dumps(list(texts), ensure_ascii=False))


class Grammars:
    """Compiles grammars for the tokens of one target, and keeps what was asked for lately.

    Making it takes about a second for a vocabulary of 128,000 tokens. May be used by several
    threads.

    Raises:
        GrammarError: llguidance is not installed, or the target's tokens do not spell its texts.
    """

    def __init__(self, target: TargetModel) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise GrammarError(
                "grammars need llguidance; pip install 'llm-inference-lab[serve]'"
            ) from error
        if target.tokenizer is None:
            raise GrammarError(
                f"{target.name} has no tokenizer, so its tokens have no texts that a grammar could "
                f"allow; add tokenizer.json to the model's directory"
            )
        self._library = llguidance
        self._size = target.vocab_size
        self._end_token_ids = target.eos_token_ids
        self._spelling = Spelling(target.tokenizer, self._size)
        self._check_spelling(target)
        words = llguidance.TokenizerWrapper(_Words(self._spelling, self._size))
        self._words = llguidance.LLTokenizer(words)
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._kept: OrderedDict[Grammar, Any] = OrderedDict()
        self._lock = Lock()

    def constraint(self, grammar: Grammar, params: SamplingParams) -> GrammarConstraint:
        """What holds a new request to a grammar.

        End tokens are the target's, unless they are ignored, and the special ones among the
        request's ``stop_token_ids``.

        Raises:
            GrammarError: the grammar is not valid, not supported, or too large.
        """
        with self._lock:
            compiled = self._kept.get(grammar)
        if compiled is None:
            compiled = self._compile(grammar)
        with self._lock:
            self._kept[grammar] = compiled
            self._kept.move_to_end(grammar)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            matcher = compiled.deep_copy()
        ends = set() if params.ignore_eos else set(self._end_token_ids)
        ends |= set(params.stop_token_ids) & self._spelling.special.keys()
        return GrammarConstraint(matcher, self._size, ends)

    def _compile(self, grammar: Grammar) -> Any:
        if grammar.kind == "json_schema":
            schema = json.loads(grammar.text)
            _check_multiples(schema)
            options = schema.get("x-guidance")
            schema["x-guidance"] = {
                **(options if isinstance(options, dict) else {}),
                "whitespace_pattern": WHITESPACE,
            }
            rule = f"%json {json.dumps(schema, ensure_ascii=False)}"
        elif grammar.kind == "regex":
            rule = f"/{self._library.regex_to_lark(grammar.text, '')}/"
        else:
            texts = json.loads(grammar.text)
            rule = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        matcher = _safely(
            self._library.LLMatcher,
            self._words,
            f"{_OPTIONS}\nstart: {rule}",
            log_level=0,
            limits=self._limits,
        )
        if matcher.is_error():
            said = _said(matcher)
            raise GrammarError(f"{grammar.kind} is not valid or not supported: {said}")
        bits = np.frombuffer(_safely(matcher.compute_bitmask), dtype=np.uint8)
        if matcher.is_error() or not bits.any():
            raise GrammarError(f"{grammar.kind} allows no text at all")
        return matcher

    def _check_spelling(self, target: TargetModel) -> None:
        """Raises GrammarError where the text of tokens is not their texts one after the other, as
        in WordPiece, which puts blanks between them."""
        ids = target.tokenizer.encode(_SAMPLE, add_special_tokens=False)
        spelt = self._spelling.spell([id_ for id_ in ids if id_ < self._size])
        text = NewText(text_decoder(target.tokenizer), []).of(ids)
        if spelt.lstrip(b" ") != text.lstrip(" ").encode():
            raise GrammarError(
                f"the tokenizer of {target.name} puts texts together in a way of its own: "
                f"{_SAMPLE!r} comes back as {text!r}; grammars need one whose tokens spell the "
                f"text, such as byte-level BPE or sentencepiece"
            )


class GrammarConstraint:
    """A grammar behind the tokens of one request. A `Constraint`.

    Args:
        matcher: of llguidance, at the beginning; it knows one token more than the target, the end
            of the text.
        vocab_size: of the target.
        end_token_ids: tokens that end the text; they may come where the grammar may end, and only
            there.
    """

    def __init__(self, matcher: Any, vocab_size: int, end_token_ids: set[int]) -> None:
        self._matcher = matcher
        self._end = vocab_size
        self._end_token_ids = end_token_ids
        is_end = np.zeros(vocab_size, dtype=np.bool_)
        is_end[list(end_token_ids)] = True
        self._ends = np.packbits(is_end, bitorder="little")
        self._words = np.packbits(~is_end, bitorder="little")
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def is_complete(self) -> bool:
        return bool(self._matcher.is_stopped())

    def advance(self, tokens: Sequence[int]) -> None:
        """Takes in new tokens, none of them an end token.

        Raises:
            GrammarError: one of them is not allowed.
        """
        for token in tokens:
            _consume(self._matcher, token)
            self._num_tokens += 1

    def masks(self, tokens: Sequence[int], parents: Sequence[int]) -> NodeMasks:
        children: list[list[int]] = [[] for _ in tokens]
        for node, parent in enumerate(parents):
            if parent >= 0:
                children[parent].append(node)
        reachable = np.zeros(len(tokens), dtype=np.bool_)
        nodes, rows = [], []
        # What goes wrong behind a draft must not touch the text.
        matcher = self._matcher.deep_copy() if children[0] else self._matcher
        path: list[int] = []  # nodes below the root that the matcher has taken in
        to_visit = [0]
        while to_visit:
            node = to_visit.pop()
            reachable[node] = True
            if tokens[node] in self._end_token_ids and node > 0:
                continue
            try:
                _move(matcher, path, _path_to(node, parents), tokens)
                if node > 0 and matcher.is_stopped():
                    continue
                row = self._row(matcher)[0]
            except GrammarError:
                if node == 0:
                    raise
                # A text that comes here finds no token, and then meets this error itself.
                row = np.zeros_like(self._ends)
                matcher, path = self._matcher.deep_copy(), []
            nodes.append(node)
            rows.append(row)
            to_visit += [child for child in reversed(children[node]) if _has(row, tokens[child])]
        return NodeMasks(nodes, np.stack(rows), reachable)

    def may_end(self) -> bool | None:
        row, may_end = self._row(self._matcher)
        return None if (row & self._words).any() else may_end

    def _row(self, matcher: Any) -> tuple[NDArray[np.uint8], bool]:
        """The tokens that may follow, as bits, and whether the text may end here."""
        bits = np.frombuffer(_safely(matcher.compute_bitmask), dtype=np.uint8)
        if matcher.is_error():
            raise _error(matcher)
        may_end = _has(bits, self._end)
        row = bits[: len(self._words)] & self._words
        return (row | self._ends if may_end else row), may_end


class _Words:
    """A target's tokens as llguidance asks for them, and one more, which ends a text."""

    def __init__(self, spelling: Spelling, size: int) -> None:
        self.tokens = [piece or b"" for piece in spelling.pieces]
        for id_, name in spelling.special.items():
            self.tokens[id_] = name.encode()
        self.tokens.append(b"")
        self.eos_token_id = size
        self.bos_token_id = None
        self.special_token_ids = [*spelling.special, size]
        self._spelling = spelling

    def __call__(self, text: bytes) -> list[int]:
        return self._spelling.longest_match(text)


def _path_to(node: int, parents: Sequence[int]) -> list[int]:
    """The nodes from below the root to a node."""
    path = []
    while node > 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def _move(matcher: Any, path: list[int], wanted: list[int], tokens: Sequence[int]) -> None:
    """Brings a matcher from one path of nodes to another; ``path`` follows it."""
    shared = 0
    while shared < min(len(path), len(wanted)) and path[shared] == wanted[shared]:
        shared += 1
    if len(path) > shared:
        _safely(matcher.rollback, len(path) - shared)
        del path[shared:]
    for node in wanted[shared:]:
        _consume(matcher, tokens[node])
        path.append(node)


def _consume(matcher: Any, token: int) -> None:
    if not _safely(matcher.consume_token, token):
        raise _error(matcher)


def _has(bits: NDArray[np.uint8], token: int) -> bool:
    return 0 <= token < 8 * len(bits) and bool(bits[token >> 3] >> (token & 7) & 1)


def _error(matcher: Any) -> GrammarError:
    said = _said(matcher)
    if said.startswith("NoExtension"):
        said = "no token of the vocabulary is allowed here"
    return GrammarError(f"the grammar cannot be followed any further: {said}")


def _said(matcher: Any) -> str:
    """What the library says went wrong, in one line."""
    return " ".join(matcher.get_error().replace("<non-verbose/>", "").split())[:300]


def _safely(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the library; also its panics, which are no Exception, become GrammarError."""
    try:
        return function(*args, **kwargs)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise GrammarError(f"the grammar library failed: {error}") from error


def _check_multiples(schema: Any) -> None:
    """Raises GrammarError where remainders would need too large an automaton."""
    found = []
    to_see = [schema]
    while to_see:
        part = to_see.pop()
        if isinstance(part, Mapping):
            multiple: Any = part.get("multipleOf")
            is_number = isinstance(multiple, (int, float)) and not isinstance(multiple, bool)
            if is_number and multiple > 0:
                found.append(Decimal(str(multiple)))
            to_see += part.values()
        elif isinstance(part, list):
            to_see += part
    digits = [_digits_behind_point(number) for number in found]
    finest = max(0, *digits) if digits else 0
    together = math.inf
    if all(abs(count) <= _MOST_DIGITS for count in digits):
        together = math.lcm(*(int(number.scaleb(finest)) for number in found))
    if together > MAX_MULTIPLE:
        raise GrammarError(
            f"json_schema has multipleOf {', '.join(map(str, found[:4]))}; their common multiple, "
            f"without the decimal point, may be {MAX_MULTIPLE} at most"
        )


def _digits_behind_point(number: Decimal) -> int:
    """Below 0: zeros before it."""
    exponent = number.normalize().as_tuple().exponent
    return -exponent if isinstance(exponent, int) else 0
