"""Texts that are held to grammars: valid, and the same whoever drafts and whoever is near."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
import pytest

from helpers.tiny_models import tiny_model, tiny_tokenizer
from inferlab import SpeculativePipeline
from inferlab.models import HFModel
from inferlab.scheduler import Request
from inferlab.specdec.grammar import Grammar
from inferlab.types import GenerationResult

SCHEMAS: dict[str, dict[str, Any]] = {
    "nested": {
        "type": "object",
        "properties": {
            "user": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 12},
                    "age": {"type": "integer", "minimum": 0, "maximum": 120},
                },
                "required": ["name", "age"],
                "additionalProperties": False,
            },
            "ok": {"type": "boolean"},
        },
        "required": ["user", "ok"],
        "additionalProperties": False,
    },
    "array": {
        "type": "array",
        "items": {"type": "integer", "minimum": -99, "maximum": 99},
        "minItems": 1,
        "maxItems": 5,
    },
    "enum": {
        "type": "object",
        "properties": {
            "colour": {"enum": ["red", "blau", "grün", 3, None]},
            "kind": {"const": "x"},
        },
        "required": ["colour", "kind"],
        "additionalProperties": False,
    },
    "number": {
        "type": "object",
        "properties": {
            "x": {"type": "number"},
            "y": {"type": "number", "minimum": 0, "maximum": 1},
            "z": {"type": "integer", "multipleOf": 7},
        },
        "required": ["x"],
        "additionalProperties": False,
    },
    "strings": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "day": {"type": "string", "format": "date"},
        },
        "required": ["id", "day"],
        "additionalProperties": False,
    },
    "unicode": {
        "type": "object",
        "properties": {
            "grüße ☃": {"type": "string", "minLength": 1, "maxLength": 6},
            "日本": {"type": "array", "items": {"enum": ["東京", "大阪", "é"]}, "maxItems": 3},
        },
        "required": ["grüße ☃", "日本"],
        "additionalProperties": False,
    },
    "refs": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer", "minimum": 0, "maximum": 9},
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["v"],
                "additionalProperties": False,
            }
        },
    },
    "any": {
        "anyOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "string"},
            {"type": "null"},
        ]
    },
}
PROMPTS = ["class Stack:\n", "data = ", 'x = {"a": 1, "b": [', "import json\n"]
SAMPLED = {"temperature": 1.0, "max_tokens": 72}
MODES: dict[str, dict[str, Any]] = {
    "ngram": {"draft_mode": "ngram", "k": 4},
    "vanilla": {"draft_mode": "vanilla", "k": 4},
    "tree": {"draft_mode": "vanilla", "tree": [3, 2, 1]},
    "eagle": {"draft_mode": "eagle", "k": 4},
    "ensemble": {"draft_mode": "ensemble", "k": 3},
    "planned": {},
}


@cache
def pipeline(mode: str = "none", max_batch: int = 16) -> SpeculativePipeline:
    return SpeculativePipeline(**MODES.get(mode, {"draft_mode": "none"}), max_batch=max_batch)


def grammar_of(seed: int) -> tuple[str, Grammar]:
    name = list(SCHEMAS)[seed % len(SCHEMAS)]
    return name, Grammar.json_schema(SCHEMAS[name])


def held(pipeline: SpeculativePipeline, seed: int, **given: Any) -> Request:
    given = SAMPLED | {"seed": seed, "grammar": grammar_of(seed)[1]} | given
    return pipeline.request(PROMPTS[seed // 8 % 4], **given)


def run(mode: str, seeds: range, max_batch: int = 16) -> list[GenerationResult]:
    made = pipeline(mode, max_batch)
    return made.engine.generate([held(made, seed) for seed in seeds])


@cache
def expected(seeds: range) -> list[list[int]]:
    """Decoded plainly, in batches."""
    return [result.token_ids for result in run("none", seeds)]


def check_json(result: GenerationResult, seed: int) -> None:
    """Valid where it is whole, else the beginning of something valid."""
    name, grammar = grammar_of(seed)
    if result.finish_reason == "stop":
        jsonschema.validate(json.loads(result.text), SCHEMAS[name])
        return
    assert result.finish_reason == "length"
    made = pipeline()
    request = made.request("a", grammar=grammar)
    assert request.constraint is not None
    request.constraint.advance(result.token_ids)


def test_five_hundred_answers_are_valid():
    seeds = range(512)
    results = run("tree", seeds)
    for seed, result in zip(seeds, results, strict=True):
        check_json(result, seed)
    whole = [r for r in results if r.finish_reason == "stop"]
    assert len(whole) > 400
    assert sum(r.stats.accepted for r in results) > 1000
    assert [r.token_ids for r in results] == expected(seeds)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "tree"])
def test_whoever_drafts_the_tokens_are_those_of_plain_decoding(mode):
    seeds = range(96)
    results = run(mode, seeds)
    for seed, result in zip(seeds, results, strict=True):
        check_json(result, seed)
    assert [r.token_ids for r in results] == expected(range(512))[:96]


def test_alone_as_in_a_batch():
    seeds = range(64)
    assert [r.token_ids for r in run("none", seeds, 1)] == expected(range(512))[:64]
    assert [r.token_ids for r in run("vanilla", seeds, 1)] == expected(range(512))[:64]


@pytest.mark.parametrize("mode", ["none", "vanilla", "tree"])
def test_neighbours_without_a_grammar_change_nothing_and_are_not_changed(mode):
    made = pipeline(mode)

    def free() -> list[Request]:
        return [made.request(p, seed=i, **SAMPLED) for i, p in enumerate(PROMPTS * 4)]

    alone = [r.token_ids for r in made.engine.generate(free())]
    requests = free()
    mixed = [r for i in range(16) for r in (requests[i], held(made, i), held(made, 16 + i))]
    results = [r.token_ids for r in made.engine.generate(mixed)]
    assert results[::3] == alone
    assert results[1::3] + results[2::3] == expected(range(512))[:32]


@pytest.mark.parametrize("mode", ["none", "vanilla", "eagle", "ngram"])
def test_texts_that_are_read_anew_go_on_as_they_would_have(mode):
    made = pipeline(mode)
    engine = made.engine
    requests = [held(made, seed) for seed in range(16)]
    for request in requests:
        engine.add(request)
    steps = 0
    while engine.scheduler.has_work:
        engine.step()
        steps += 1
        if steps % 5 == 0:
            engine.recover()
    assert [r.output for r in requests] == expected(range(512))[:16]


REGEXES = [
    r"[0-9]{3}-[0-9]{4}",
    r"(abc|a)(d|x)*y",
    r"\w{1,8}@\w{1,8}\.(com|org)",
    r"yes|no",
    r"é+ ☃{2}",
]


@pytest.mark.parametrize("mode", ["none", "vanilla"])
@pytest.mark.parametrize("regex", REGEXES)
def test_a_regex_matches_the_whole_text(regex, mode):
    results = pipeline(mode).generate(
        PROMPTS * 3, grammar=Grammar.regex(regex), seed=list(range(12)), **SAMPLED
    )
    whole = [r for r in results if r["finish_reason"] == "stop"]
    assert len(whole) > 4
    for result in whole:
        assert re.fullmatch(regex, result["text"]), result["text"]


def test_a_choice_is_one_of_the_texts():
    texts = ["positive", "negative", "neutral", "negative, mostly"]
    results = pipeline("vanilla").generate(
        PROMPTS * 5, grammar=Grammar.choice(texts), seed=list(range(20)), **SAMPLED
    )
    found = {r["text"] for r in results}
    assert found <= set(texts)
    assert len(found) > 1
    assert {r["finish_reason"] for r in results} == {"stop"}


def test_any_object_is_an_object():
    results = pipeline().generate(
        PROMPTS * 2, grammar=Grammar.json_object(), seed=list(range(8)), **SAMPLED
    )
    for result in results:
        if result["finish_reason"] == "stop":
            assert isinstance(json.loads(result["text"]), dict)


@pytest.mark.parametrize("mode", ["none", "vanilla"])
def test_end_tokens_end_a_text_that_could_go_on(mode):
    """An end token is the last token then, and no part of the text."""
    made = pipeline(mode)
    eos = made.target.eos_token_ids[0]
    likely = {"logit_bias": {eos: 100.0}, "grammar": Grammar.regex("[a-z]{4,}")}
    result = made.generate("x", **SAMPLED, **likely)
    assert result["finish_reason"] == "stop"
    assert re.fullmatch("[a-z]{4,}", result["text"])
    assert result["token_ids"][-1] == eos
    later = made.generate("x", **SAMPLED, **likely, min_tokens=9)
    assert len(later["token_ids"]) == 10
    never = made.generate("x", **SAMPLED, **likely, ignore_eos=True)
    assert (never["finish_reason"], eos in never["token_ids"]) == ("length", False)


def test_stop_strings_and_the_filters_apply_as_ever():
    made = pipeline("vanilla")
    grammar = Grammar.regex("([a-d]{2};){30}")
    cut = made.generate("x", grammar=grammar, **SAMPLED, stop=[";"])
    assert (cut["finish_reason"], len(cut["text"])) == ("stop_string", 2)
    filtered = {"top_k": 5, "top_p": 0.8, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    given = SAMPLED | filtered | {"grammar": grammar, "seed": 3}
    texts = {pipeline(m).generate("x", **given)["text"] for m in ("none", "vanilla", "tree")}
    assert len(texts) == 1


def test_streams_have_the_text_and_its_end():
    made = pipeline("vanilla")
    given = SAMPLED | {"grammar": grammar_of(5)[1], "seed": 5}
    pieces = list(made.stream("data = ", **given))
    assert "".join(piece.text for piece in pieces) == made.generate("data = ", **given)["text"]
    assert pieces[-1].result["finish_reason"] == "stop"


def test_what_is_no_grammar_is_refused():
    with pytest.raises(TypeError, match=r"grammar is \{'type': 'object'\}; it must be a Grammar"):
        pipeline().generate("x", grammar={"type": "object"})
    with pytest.raises(ValueError, match="json_schema is not valid or not supported"):
        pipeline().generate("x", grammar=Grammar.json_schema({"not": {}}))


@pytest.mark.parametrize("policy", ["rejection", "typical", "conf_threshold", "topk_agree"])
def test_other_policies_keep_to_the_grammar_too(policy):
    made = SpeculativePipeline(tree=[3, 2], policy=policy, max_batch=16, p=1.0, tau=0.0)
    results = made.engine.generate([held(made, seed) for seed in range(32)])
    for seed, result in enumerate(results):
        check_json(result, seed)
    assert sum(r.stats.accepted for r in results) > 100


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_random_weights_keep_to_the_grammar(family):
    """Of a vocabulary that knows ASCII alone, in which an umlaut leads nowhere."""
    texts = []
    for mode in ("none", "self", "recycling"):
        target = HFModel(tiny_model(family), tiny_tokenizer())
        drafts = {} if mode == "none" else {"k": 2}
        made = SpeculativePipeline(draft_mode=mode, target=target, max_batch=8, **drafts)
        names = ["nested", "array", "strings"]
        results = made.engine.generate(
            [
                made.request(
                    [5 + seed],
                    grammar=Grammar.json_schema(SCHEMAS[names[seed % 3]]),
                    temperature=1.0,
                    max_tokens=60,
                    seed=seed,
                )
                for seed in range(24)
            ]
        )
        for seed, result in enumerate(results):
            if result.finish_reason == "stop":
                jsonschema.validate(json.loads(result.text), SCHEMAS[names[seed % 3]])
        texts.append([r.token_ids for r in results])
        lost = made.engine.generate([made.request([5], grammar=Grammar.regex("a(é|ü)"))])[0]
        assert lost.finish_reason == "error"
        assert "no token of the vocabulary is allowed here" in lost.error
    assert texts[1:] == texts[:1] * 2
