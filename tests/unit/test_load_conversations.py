"""Prompt sets and traces: every layout is read, and a bad line is named."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from helpers.tiny_models import tiny_tokenizer
from inferlab.errors import UsageError
from inferlab.load.conversations import Conversation, Turn
from inferlab.load.prompt_sets import read_conversations
from inferlab.load.synthetic import Writer
from inferlab.prompts import read_prompts


@pytest.fixture
def written(tmp_path):
    """Writes a file: text as it is, objects as JSON lines."""

    def write(*parts: str | dict) -> Path:
        file = tmp_path / "set"
        lines = [part if isinstance(part, str) else json.dumps(part) for part in parts]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(tiny_tokenizer(400), "tiny")


def said(conversations: list[Conversation]) -> list[list[str]]:
    return [[turn.text for turn in c.turns] for c in conversations]


# --- JSON ---------------------------------------------------------------------------------------


def test_spec_bench_and_speed_bench(written):
    file = written(
        {"question_id": 81, "category": "writing", "turns": ["One.", "Two."], "reference": ["x"]},
        {"question_id": "a-1", "category": "rag", "sub_category": "s", "turns": ["Three."]},
    )
    assert read_conversations(file) == [
        Conversation((Turn("One."), Turn("Two.")), 81, "writing"),
        Conversation((Turn("Three."),), "a-1", "rag"),
    ]


def test_prompts_with_bounds_and_system_messages(written):
    file = written(
        {"prompt": "One.", "id": "x", "category": "c", "system": "Be brief.", "max_tokens": 7},
        "",
        {"turns": ["Two.", "Three."], "max_completion_tokens": 9},
    )
    assert read_conversations(file) == [
        Conversation((Turn("One.", 7),), "x", "c", "Be brief."),
        Conversation((Turn("Two.", 9), Turn("Three.", 9))),
    ]
    assert [c.where for c in read_conversations(file)] == [f"{file}:1", f"{file}:3"]


def test_the_same_lines_are_prompts_and_conversations(written):
    file = written(
        {"prompt": "One.", "id": 5}, {"question_id": 6, "category": "c", "turns": ["Two.", "3"]}
    )
    conversations = read_conversations(file)
    assert [(p.text, p.id, p.category, p.where) for p in read_prompts(file)] == [
        (c.turns[0].text, c.id, c.category, c.where) for c in conversations
    ]


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes, one."},
    {"role": "user", "content": [{"type": "text", "text": "Tw"}, {"type": "text", "text": "o?"}]},
    {"role": "assistant", "content": None, "tool_calls": []},
]


def test_messages_send_what_users_said(written):
    file = written({"messages": MESSAGES, "max_tokens": 5, "id": 1})
    assert read_conversations(file) == [
        Conversation((Turn("One?", 5), Turn("Two?", 5)), 1, None, "Be brief.")
    ]


def test_recorded_answers_bound_new_ones_where_that_is_asked(written):
    file = written({"messages": MESSAGES, "max_tokens": 5})
    (conversation,) = read_conversations(file, recorded=lambda text: len(text.split()))
    assert conversation.turns == (Turn("One?", 2), Turn("Two?", 5))


def test_lines_of_a_batch_file(written):
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    file = written(
        {"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    )
    assert read_conversations(file) == [Conversation((Turn("Hi", 3),), "r-1")]


SHAREGPT = [
    {
        "id": "QWJ_0",
        "conversations": [
            {"from": "human", "value": "One?"},
            {"from": "gpt", "value": "It is one."},
            {"from": "human", "value": "Two?"},
            {"from": "gpt", "value": "Two."},
        ],
    },
    {"id": "empty", "conversations": []},
    {
        "id": "other",
        "conversations": [
            {"from": "system", "value": "Rhyme."},
            {"from": "bing", "value": "Hello."},
            {"from": "user", "value": "Three?"},
        ],
    },
]


@pytest.mark.parametrize("layout", ["list", "indented", "lines"])
def test_sharegpt(written, caplog, layout):
    if layout == "lines":
        file = written(*SHAREGPT)
    else:
        file = written(json.dumps(SHAREGPT, indent=2 if layout == "indented" else None))
    with caplog.at_level(logging.WARNING):
        conversations = read_conversations(file)
    assert conversations == [
        Conversation((Turn("One?"), Turn("Two?")), "QWJ_0"),
        Conversation((Turn("Three?"),), "other", None, "Rhyme."),
    ]
    assert "1 conversations in which no human speaks" in caplog.text
    counted = read_conversations(file, recorded=lambda text: len(text.split()))
    assert [turn.max_tokens for c in counted for turn in c.turns] == [3, 1, None]


def test_places_in_a_list_are_lines(written):
    file = written("[", '  {"prompt": "a"},', "", '  {"prompt": "b"}, {"prompt": "c"}', "]")
    assert [c.where for c in read_conversations(file)] == [f"{file}:{n}" for n in (2, 4, 4)]


def test_a_limit_leaves_the_rest_unread(written):
    file = written({"prompt": "a"}, {"prompt": "b"}, "this is not JSON")
    assert said(read_conversations(file, limit=2)) == [["a"], ["b"]]
    with pytest.raises(UsageError, match="limit: 0 is not allowed"):
        read_conversations(file, limit=0)


# --- text ---------------------------------------------------------------------------------------


def test_plain_text_is_a_prompt_a_line(written):
    file = written("Write a poem.", "", "  Count to three, then stop.  ")
    assert said(read_conversations(file)) == [["Write a poem."], ["Count to three, then stop."]]
    assert read_conversations(file)[1].where == f"{file}:3"


def test_what_begins_with_a_bracket_is_text_only_if_said_so(written):
    file = written("[INST] Hello [/INST]", "{braces}")
    with pytest.raises(UsageError, match=r":1: is not JSON.*--conversations-kind text"):
        read_conversations(file)
    assert said(read_conversations(file, "text")) == [["[INST] Hello [/INST]"], ["{braces}"]]


# --- traces -------------------------------------------------------------------------------------


def times(conversations: list[Conversation]) -> list[float | None]:
    return [c.at_s for c in conversations]


def test_a_mooncake_trace_has_its_lengths_and_its_beginnings(written, writer):
    file = written(
        {"timestamp": 1000, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 1027, "input_length": 1030, "output_length": 6, "hash_ids": [0, 1, 2]},
        {"timestamp": 4052, "input_length": 40, "output_length": 7, "hash_ids": [9]},
    )
    conversations = read_conversations(file, writer=writer)
    assert times(conversations) == [0.0, 0.027, 3.052]
    texts = [c.turns[0].text for c in conversations]
    assert [writer.tokens(text) for text in texts] == [600, 1030, 40]
    assert [c.turns[0].max_tokens for c in conversations] == [5, 6, 7]
    assert texts[1].startswith(texts[0] + " ")
    assert not texts[1].startswith(texts[2])
    assert read_conversations(file, writer=writer) == conversations


def test_lines_of_a_trace_without_blocks_differ(written, writer):
    file = written(
        *({"timestamp": i, "input_length": 30, "output_length": 1} for i in range(5)),
    )
    texts = [c.turns[0].text for c in read_conversations(file, writer=writer)]
    assert len(set(texts)) == 5


def test_qwen_bailian_counts_seconds_and_short_blocks(written, writer):
    line = {"chat_id": 7, "parent_chat_id": -1, "type": "text", "turn": 1, "output_length": 3}
    file = written(
        {**line, "timestamp": 61.114, "input_length": 20, "hash_ids": [1, 2]},
        {**line, "timestamp": 61.5, "input_length": 40, "hash_ids": [1, 3]},
    )
    conversations = read_conversations(file, writer=writer)
    assert times(conversations) == [0.0, 0.386]
    words = [c.turns[0].text.split() for c in conversations]
    assert words[0][:16] == words[1][:16]
    assert words[0][16:] != words[1][16:20]
    assert [writer.tokens(c.turns[0].text) for c in conversations] == [20, 40]


def test_burstgpt(written, writer):
    file = written(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,47,18,65,Conversation log",
        "7.5,GPT-4,12,3,15,API log",
    )
    conversations = read_conversations(file, writer=writer)
    assert times(conversations) == [0.0, 2.5]
    assert [c.turns[0].max_tokens for c in conversations] == [18, 3]
    assert [writer.tokens(c.turns[0].text) for c in conversations] == [47, 12]


def test_azure_writes_dates_and_may_be_out_of_order(written, writer):
    file = written(
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:04.0319600,9,4",
        "2023-11-16 18:17:03.9799600,8,3",
    )
    conversations = read_conversations(file, writer=writer)
    assert times(conversations) == [0.0, 0.052]
    assert [c.turns[0].max_tokens for c in conversations] == [3, 4]
    assert conversations[0].where == f"{file}:3"


def test_vidur(written, writer):
    file = written("arrived_at,num_prefill_tokens,num_decode_tokens", "0.25,9,4", "1.5,8,3")
    assert times(read_conversations(file, writer=writer)) == [0.0, 1.25]


def test_a_trace_of_texts_needs_no_tokenizer(written):
    file = written(
        {"timestamp": "2024-05-10T00:00:01Z", "prompt": "b", "output_length": 4},
        {"timestamp": "2024-05-10T00:00:00.5+00:00", "turns": ["a", "c"]},
    )
    assert read_conversations(file) == [
        Conversation((Turn("a"), Turn("c")), at_s=0.0),
        Conversation((Turn("b", 4),), at_s=0.5),
    ]


def test_the_unit_of_a_trace_can_be_told(written):
    file = written({"timestamp": 3, "prompt": "a"}, {"timestamp": 5, "prompt": "b"})
    assert times(read_conversations(file)) == [0.0, 0.002]
    assert times(read_conversations(file, time_unit="s")) == [0.0, 2.0]
    named = written({"timestamp_s": 3, "prompt": "a"}, {"timestamp_s": 5, "prompt": "b"})
    assert times(read_conversations(named, time_unit="ms")) == [0.0, 2.0]


# --- what is wrong is named ---------------------------------------------------------------------

USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "is not JSON"),
        ("[1]", "must be an object with `prompt`, `turns`, `messages`"),
        ({"text": "a"}, "has none of `prompt`, `turns`, `messages`"),
        ({"prompt": 3}, "`prompt` must be a text, not 3"),
        ({"turns": []}, "`turns` must be a list with at least one text"),
        ({"turns": ["a", None]}, "`turns[1]` must be a text, not None"),
        ({"prompt": "a", "messages": [USER]}, "has both `messages` and `prompt`"),
        ({"prompt": "a", "max_tokens": 0}, "`max_tokens` must be an integer of at least 1, not 0"),
        ({"prompt": "a", "max_tokens": True}, "`max_tokens` must be an integer"),
        ({"prompt": "a", "system": 1}, "`system` must be a text"),
        ({"messages": {}}, "`messages` must be a list"),
        ({"messages": []}, "`messages` has none of a user"),
        ({"messages": ["a"]}, "`messages[0]` must be an object with `role` and `content`"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "`messages[0]` is of 'tool'; known are"),
        ({"messages": [{"role": "user"}]}, "`messages[0]`.content must be a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "`messages[0]`.content must be a text, or parts that are texts",
        ),
        (
            {"messages": [USER, {"role": "system", "content": "b"}]},
            "`messages` has a system message behind the first message",
        ),
        ({"conversations": [{"value": "a"}]}, "must be an object with `from` and `value`"),
        ({"prompt": "b", "timestamp": "soon"}, "`timestamp` must be a number or a date"),
        ({"prompt": "b", "timestamp": None}, "`timestamp` must be a number or a date"),
        ({"prompt": "b", "timestamp": float("nan")}, "`timestamp` must be a number or a date"),
        ({"timestamp": 0, "input_length": 5}, "has lengths and no text; give a tokenizer"),
        ({"timestamp": 0, "input_length": 0}, "`input_length` must be at least 1"),
        ({"timestamp": 0, "input_length": "x"}, "`input_length` must be an integer of at least 0"),
        ({"timestamp": 0, "output_length": 5}, "has none of"),
        ({"prompt": "a", "timestamp": 0, "output_length": 0}, "requests that failed are recorded"),
        ({"prompt": "a", "timestamp": 0}, "has no timestamp, but others have"),
    ],
)
def test_a_bad_line_is_named(written, line, message):
    file = written({"prompt": "good"}, "", line)
    with pytest.raises(UsageError) as caught:
        read_conversations(file)
    place = 1 if "has no timestamp" in message else 3
    assert str(caught.value).startswith(f"{file}:{place}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"prompt": "a"},\n{"prompt" "b"}]', ":3: is not JSON"),
        ('[{"prompt": "a"}\n{"prompt": "b"}]', ":2: is not JSON: a comma or ] must follow"),
        ('[{"prompt": "a"}', "a comma or ] must follow"),
        ('[\n{"prompt": "a"},\n3]', ":3: must be an object with"),
        ('[{"prompt": "a"}]\nmore', "something follows the list"),
        ('[{"prompt": "a"}, ' + "[" * 100_000, "cannot be read"),
        ("[]", "holds no conversations"),
        (" \n", "holds no conversations"),
        ("Timestamp,Model\n1,GPT-4", ":2: has no column of input lengths; it has Timestamp, Model"),
        ("Timestamp,Request tokens\n1", ":2: has 1 columns, the header 2"),
        ("Timestamp,Request tokens\n1,-4", ":2: `Request tokens` must be an integer of at least 0"),
        ("Timestamp,Request tokens\n,4", ":2: has lengths and no text"),
    ],
)
def test_a_bad_file_is_named(written, text, message):
    file = written(text)
    with pytest.raises(UsageError) as caught:
        read_conversations(file)
    assert str(caught.value).startswith(f"{file}:")
    assert message in str(caught.value)


def test_bad_blocks_and_units_are_named(written, writer):
    line = {"timestamp": 0, "input_length": 5, "output_length": 1}
    for blocks in (3, ["a"], [-1], [True]):
        with pytest.raises(UsageError, match="`hash_ids` must be a list of integers"):
            read_conversations(written({**line, "hash_ids": blocks}), writer=writer)
    with pytest.raises(UsageError, match="time unit: 'min' is unknown; known are ms, s"):
        read_conversations(written(line), time_unit="min")
    with pytest.raises(UsageError, match="kind: 'xml' is unknown; known are json, csv, text"):
        read_conversations(written(line), "xml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_conversations("no-such-file")


def test_a_category_is_a_text(written):
    file = written(*({"prompt": "a", "category": c} for c in ("x", 7, None)))
    assert [c.category for c in read_conversations(file)] == ["x", "7", None]
    file = written({"prompt": "a"}, {"prompt": "b", "category": ["x"]})
    with pytest.raises(UsageError, match=r"set:2: `category` must be a text, not \['x'\]"):
        read_conversations(file)


def test_texts_that_begin_with_a_bracket(written):
    file = written("[1, see] this is text", "{x} too")
    with pytest.raises(UsageError, match=r"not 1; texts that .* --conversations-kind text"):
        read_conversations(file)
    assert said(read_conversations(file, "text")) == [["[1, see] this is text"], ["{x} too"]]
