"""Grammars and what they allow behind tokens of several kinds of vocabularies."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.tiny_models import tiny_tokenizer
from helpers.vocabularies import trained_tokenizer
from inferlab.models import FakeLM
from inferlab.models.spelling import Spelling
from inferlab.specdec.grammar import MAX_CHARACTERS, Grammar, GrammarError, Grammars
from inferlab.types import SamplingParams

KINDS = ("byte_bpe", "unigram", "sentencepiece_bpe", "tiny")
PADDING = 5  # columns of the logits without a token
SCHEMA = {
    "type": "object",
    "properties": {"a b": {"type": "string", "maxLength": 5}, "n": {"type": "integer"}},
    "required": ["a b"],
    "additionalProperties": False,
}
GRAMMARS = [
    Grammar.json_schema(SCHEMA),
    Grammar.json_object(),
    Grammar.regex(r"(ab|a)c?[0-9]*"),
    Grammar.choice(["yes", "yes, sir", "no"]),
]


def target_of(kind: str) -> SimpleNamespace:
    tokenizer = tiny_tokenizer() if kind == "tiny" else trained_tokenizer(kind, 400)
    return SimpleNamespace(
        name=kind,
        tokenizer=tokenizer,
        vocab_size=len(tokenizer) + PADDING,
        eos_token_ids=(tokenizer.eos_token_id,),
    )


@pytest.fixture(scope="module", params=KINDS)
def target(request):
    return target_of(request.param)


@pytest.fixture(scope="module")
def grammars(target):
    return Grammars(target)


def unpacked(row: np.ndarray, size: int) -> np.ndarray:
    return np.unpackbits(row, bitorder="little")[:size].astype(bool)


def allowed(constraint, size: int) -> set[int]:
    """What may follow the tokens taken in."""
    masks = constraint.masks([0], [-1])
    assert masks.nodes == [0]
    return set(np.flatnonzero(unpacked(masks.bits[0], size)).tolist())


def spelt(target, text: str) -> list[int]:
    spelling = Spelling(target.tokenizer, target.vocab_size)
    ids = spelling.longest_match(text.encode())
    assert spelling.spell(ids).decode() == text
    return ids


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.kind)
def test_what_may_follow_is_what_can_be_taken_in(target, grammars, grammar):
    """Tokens of the whole vocabulary are tried at every place of a text, every fifth of them at
    each and all that begin as the text goes on."""
    texts = {
        "json_schema": '{"a b": "x", "n": 2}',
        "regex": "abc19",
        "choice": "yes, sir",
    }
    text = texts[grammar.kind]
    ids = spelt(target, text)
    pieces = Spelling(target.tokenizer, target.vocab_size).pieces
    named = [id_ for id_, piece in enumerate(pieces) if piece]
    seen = 0
    for at in range(len(ids)):
        constraint = grammars.constraint(grammar, SamplingParams())
        constraint.advance(ids[:at])
        follows = allowed(constraint, target.vocab_size)
        first = pieces[ids[at]][:1]
        tried = {id_ for id_ in named if id_ % 5 == at % 5 or pieces[id_].startswith(first)}
        taken = set()
        for token in tried:
            other = grammars.constraint(grammar, SamplingParams())
            other.advance(ids[:at])
            try:
                other.advance([token])
            except GrammarError:
                continue
            taken.add(token)
        assert follows & tried == taken
        assert ids[at] in follows
        seen += len(taken)
    assert seen >= len(ids)


def unnamed(target) -> list[int]:
    """Ids that spell nothing: special ones and padding."""
    pieces = Spelling(target.tokenizer, target.vocab_size).pieces
    return [id_ for id_, piece in enumerate(pieces) if not piece]


def test_a_tree_is_looked_at_as_its_paths_are_one_by_one(target, grammars):
    grammar = GRAMMARS[2]
    a, b, c, one, d = (spelt(target, letter)[0] for letter in "abc1d")
    eos = target.eos_token_ids[0]
    # The second child of the root, 7, is as good as the first: the matcher must go back for it.
    #        0  1  2  3  4    5  6  7    8    9 10 11
    tokens = [0, a, b, d, c, one, b, a, eos, one, c, b]
    parents = [-1, 0, 1, 1, 2, 4, 3, 0, 4, 8, 7, 10]
    constraint = grammars.constraint(grammar, SamplingParams())
    masks = constraint.masks(tokens, parents)
    assert np.flatnonzero(masks.reachable).tolist() == [0, 1, 2, 4, 5, 7, 8, 10]
    assert sorted(masks.nodes) == [0, 1, 2, 4, 5, 7, 10]  # behind an end token nothing is asked
    for node, row in zip(masks.nodes, masks.bits, strict=True):
        path, at = [], node
        while at > 0:
            path.insert(0, tokens[at])
            at = parents[at]
        alone = grammars.constraint(grammar, SamplingParams())
        alone.advance(path)
        assert set(np.flatnonzero(unpacked(row, target.vocab_size))) == allowed(
            alone, target.vocab_size
        )
    assert constraint.num_tokens == 0
    assert allowed(constraint, target.vocab_size)  # is where it was


def test_end_tokens_may_come_where_the_text_may_end(target, grammars):
    eos = target.eos_token_ids[0]
    constraint = grammars.constraint(GRAMMARS[3], SamplingParams())
    assert eos not in allowed(constraint, target.vocab_size)
    constraint.advance(spelt(target, "yes"))
    assert eos in allowed(constraint, target.vocab_size)
    assert not constraint.is_complete  # "yes, sir"
    constraint.advance(spelt(target, ", sir"))
    assert constraint.is_complete
    ignoring = grammars.constraint(GRAMMARS[3], SamplingParams(ignore_eos=True))
    ignoring.advance(spelt(target, "yes"))
    assert eos not in allowed(ignoring, target.vocab_size)


def test_special_stop_tokens_are_end_tokens_and_others_are_text(target, grammars):
    special = target.tokenizer.convert_tokens_to_ids("<s>")
    letter = spelt(target, "y")[0]
    params = SamplingParams(stop_token_ids=(special, letter))
    constraint = grammars.constraint(Grammar.regex("xy*"), params)
    assert special not in allowed(constraint, target.vocab_size)
    constraint.advance(spelt(target, "x"))
    assert {special, letter} <= allowed(constraint, target.vocab_size)


def test_padding_and_tokens_without_text_are_never_allowed(target, grammars):
    constraint = grammars.constraint(Grammar.regex(r"(?s:.*)"), SamplingParams())
    assert not allowed(constraint, target.vocab_size) & (
        set(unnamed(target)) - set(target.eos_token_ids)
    )


def test_constraints_of_one_grammar_know_nothing_of_each_other(target, grammars):
    first, second = (grammars.constraint(GRAMMARS[0], SamplingParams()) for _ in range(2))
    before = allowed(second, target.vocab_size)
    first.advance(spelt(target, '{"a b"'))
    assert allowed(second, target.vocab_size) == before
    assert (first.num_tokens, second.num_tokens) == (len(spelt(target, '{"a b"')), 0)


def test_a_token_that_does_not_fit_is_an_error(target, grammars):
    constraint = grammars.constraint(GRAMMARS[0], SamplingParams())
    with pytest.raises(GrammarError, match="cannot be followed any further"):
        constraint.advance(spelt(target, "x"))
    with pytest.raises(GrammarError):
        constraint.masks([0], [-1])


def test_blanks_are_bounded(target, grammars):
    for text, fits in (
        ('{"a b":"x"}', True),
        ('{\n\t\t "a b" :\n"x"\n}', True),
        ("{  ", False),
        ("{\n\n", False),
        ("{\n" + " " * 21, False),
        (" {", False),
    ):
        constraint = grammars.constraint(GRAMMARS[0], SamplingParams())
        bytewise = [id_ for letter in text for id_ in spelt_or_skip(target, letter)]
        if fits:
            constraint.advance(bytewise)
            assert constraint.is_complete
        else:
            with pytest.raises(GrammarError):
                constraint.advance(bytewise)


def spelt_or_skip(target, letter: str) -> list[int]:
    spelling = Spelling(target.tokenizer, target.vocab_size)
    if letter == "\t" and b"\t" not in spelling.ids:
        letter = " "
    if letter == "\n" and b"\n" not in spelling.ids:
        pytest.skip("this vocabulary has no new line")
    return spelt(target, letter)


def test_a_text_that_the_vocabulary_cannot_spell_leads_nowhere():
    target = target_of("tiny")  # knows ASCII alone
    constraint = Grammars(target).constraint(Grammar.regex("a(é|ü)"), SamplingParams())
    constraint.advance(spelt(target, "a"))
    with pytest.raises(GrammarError, match="no token of the vocabulary is allowed here"):
        constraint.masks([0], [-1])
    with pytest.raises(GrammarError, match="no token of the vocabulary is allowed here"):
        constraint.may_end()
    maybe = Grammars(target).constraint(Grammar.regex("a(é)?"), SamplingParams(ignore_eos=True))
    maybe.advance(spelt(target, "a"))
    assert maybe.may_end() is True
    open_ = Grammars(target).constraint(Grammar.regex("ab?"), SamplingParams())
    assert open_.may_end() is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.json_schema("{"), "json_schema is not a JSON document"),
        (lambda: Grammar.json_schema("[1]"), r"json_schema is \[1\]; it must be an object"),
        (lambda: Grammar.json_schema({"a": float("nan")}), "json_schema is not a JSON document"),
        (lambda: Grammar.json_schema({"a": {1}}), "json_schema is not a JSON document"),
        (lambda: Grammar.regex(""), "regex is ''"),
        (lambda: Grammar.choice([]), r"choice is \[\]"),
        (lambda: Grammar.choice(["a", ""]), "choice is"),
        (lambda: Grammar.choice("ab"), "choice is ab"),
        (lambda: Grammar.regex("a" * (MAX_CHARACTERS + 1)), "at most 131072 are allowed"),
    ],
)
def test_what_is_no_grammar_is_refused_at_once(make, message):
    with pytest.raises(GrammarError, match=message):
        make()


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar.json_schema({"not": {}}), 'Unimplemented keys: \\["not"\\]'),
        (Grammar.json_schema({"type": 5}), "type must be"),
        (Grammar.json_schema({"$ref": "http://localhost/x"}), "not present in a registry"),
        (Grammar.json_schema({"minimum": 3, "maximum": 1, "type": "integer"}), "Unsatisfiable"),
        (Grammar.json_schema({"type": "string", "format": "nonsense"}), "Unknown format"),
        (Grammar.json_schema(nested(300)), "recursion limit"),
        (Grammar.json_schema({"multipleOf": 1_000_003}), "multipleOf 1000003"),
        (
            Grammar.json_schema({"allOf": [{"multipleOf": 997}, {"multipleOf": 9.91}]}),
            "common multiple",
        ),
        (Grammar.json_schema({"multipleOf": 10**60}), "multipleOf"),
        (Grammar.regex("(a"), "regex is not valid or not supported"),
        (Grammar.json_schema({"$ref": "#"}), "json_schema allows no text at all"),
        (Grammar.regex("(?=a)b"), "look-around"),
    ],
)
def test_what_is_not_supported_is_refused_when_it_is_compiled(grammar, message):
    with pytest.raises(GrammarError, match=message):
        _byte_bpe().constraint(grammar, SamplingParams())


def _byte_bpe() -> Grammars:
    if not hasattr(_byte_bpe, "made"):
        _byte_bpe.made = Grammars(target_of("byte_bpe"))
    return _byte_bpe.made


def test_multiples_within_the_bound_are_taken():
    for multiple in (5, 0.25, 9973, 1e2):
        schema = {"type": "number", "multipleOf": multiple}
        _byte_bpe().constraint(Grammar.json_schema(schema), SamplingParams())


def test_what_was_asked_for_lately_is_kept(monkeypatch):
    grammars = Grammars(target_of("byte_bpe"))
    compiled = []
    compile_ = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda g: (compiled.append(g), compile_(g))[1])
    for n in (0, 1, 0, *range(70), 69, 0):
        grammars.constraint(Grammar.regex(f"a{n}"), SamplingParams())
    assert compiled == [Grammar.regex(f"a{n}") for n in (0, 1, *range(2, 70), 0)]
    assert len(grammars._kept) == 64


def test_choices_are_the_texts_whatever_they_hold():
    texts = ['say "hi"\\n', "a\nb\t", "日本 ☃", "/x/ | y", "%{}#"]
    target = target_of("byte_bpe")
    for text in texts:
        constraint = _byte_bpe().constraint(Grammar.choice(texts), SamplingParams())
        constraint.advance(spelt(target, text))
        assert constraint.is_complete


def test_a_tokenizer_that_puts_blanks_between_its_tokens_is_refused():
    with pytest.raises(GrammarError, match=r"wordpiece puts texts together .* sentencepiece"):
        Grammars(target_of("wordpiece"))


def test_a_target_without_a_tokenizer_is_refused():
    bare = FakeLM(100)
    with pytest.raises(GrammarError, match="has no tokenizer"):
        Grammars(bare)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(GrammarError, match=r"pip install 'llm-inference-lab\[serve\]'"):
        Grammars(target_of("tiny"))


def test_schemas_keep_the_order_of_their_properties():
    schema = {"type": "object", "properties": {"z": {}, "a": {}, "m": {}}}
    grammar = Grammar.json_schema(schema)
    assert list(json.loads(grammar.text)["properties"]) == ["z", "a", "m"]
    assert Grammar.json_schema(json.dumps(schema)) == grammar
