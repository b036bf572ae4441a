"""Prompt sets of every public layout, as conversations."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from inferlab.errors import UsageError
from inferlab.load.conversations import Conversation, Turn
from inferlab.load.synthetic import Writer
from inferlab.load.traces import TraceReader, csv_rows, in_order, is_csv_trace
from inferlab.prompts import (
    labels_of,
    numbered_lines,
    object_of,
    parse_json,
    read_text,
    texts_of,
)

logger = logging.getLogger(__name__)

KINDS = ("json", "csv", "text")

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
}
_SPACES = re.compile(r"\s*")
_FORMS = ("messages", "conversations", "prompt", "turns")
_BRACKETS = "texts that begin with a bracket must be said to be some: --conversations-kind text"
_KEYS = "`prompt`, `turns`, `messages`, `conversations`, or `timestamp` and `input_length`"


def read_conversations(
    path: str | Path,
    kind: str | None = None,
    *,
    recorded: Callable[[str], int] | None = None,
    writer: Writer | None = None,
    time_unit: str | None = None,
    limit: int | None = None,
) -> list[Conversation]:
    """Reads a file of prompts or conversations, or a trace; ``-`` is stdin.

    JSON, one object a line or a list of objects, in which every object may have its own form:

    - ``{"prompt": "..."}``, or Spec-Bench's and SPEED-Bench's ``{"question_id": ..., "category":
      ..., "turns": ["...", ...]}``;
    - OpenAI's ``{"messages": [{"role": "user", "content": "..."}, ...]}``, also as the ``body`` of
      a line of a batch file;
    - ShareGPT's ``{"id": ..., "conversations": [{"from": "human", "value": "..."}, ...]}``;
      such conversations in which no human speaks are left out, and their number is logged.

    The turns of users are sent; what assistants said there is not: the server answers anew. Each
    object may have ``id``, ``category``, ``system`` (a system message) and ``max_tokens``.

    Traces are JSON of these forms with a ``timestamp``, or lines of lengths alone, as JSON or CSV
    (:mod:`inferlab.load.traces` names the formats); they are sorted by time, the first is at 0 s.

    Plain text is a prompt a line, without the spaces around it; prompts of several lines are for
    JSON. Blank lines count for nothing.

    Args:
        kind: "json", "csv" or "text"; None: by the content. What begins with a bracket is JSON,
            what begins with a line of column names, a time among them, is CSV, all else text.
        recorded: counts the tokens of an answer that is in the file; as many then bound the new
            one. None: recorded answers say nothing.
        writer: makes the texts of traces that have lengths alone.
        time_unit: "ms" or "s", of a trace's numbers; None: as its format has it.
        limit: no more conversations than these are read, the first of the file.

    Raises:
        UsageError: no such file, nothing in it, an unknown kind, or a bad line; names file and
            line.
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"kind: {kind!r} is unknown; known are {', '.join(KINDS)}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit: {limit} is not allowed; must be at least 1")
    text = read_text(path)
    kind = kind or _kind_of(text)
    trace = TraceReader(writer, time_unit or ("s" if kind == "csv" else None))
    made: Iterator[Conversation]
    if kind == "text":
        made = (
            Conversation((Turn(line.strip()),), where=where)
            for where, line in numbered_lines(text, path)
        )
    elif kind == "csv":
        made = (
            _timed_lengths(row, where, trace, number)
            for number, (where, row) in enumerate(csv_rows(text, path))
        )
    else:
        made = _of_json(text, path, recorded, trace)
    conversations = in_order(itertools.islice(made, limit))
    if not conversations:
        raise UsageError(
            f"{path}: holds no conversations; give JSON objects, a line of text for each prompt, "
            "or a trace"
        )
    return conversations


def _kind_of(text: str) -> str:
    beginning = text.lstrip()[:1]
    if beginning and beginning in "{[":
        return "json"
    return "csv" if is_csv_trace(text.lstrip().partition("\n")[0]) else "text"


def _of_json(
    text: str, path: str | Path, recorded: Callable[[str], int] | None, trace: TraceReader
) -> Iterator[Conversation]:
    left_out = 0
    for number, (where, entry) in enumerate(_entries(text, path)):
        made = _conversation(entry, where, recorded, trace, number)
        if made is None:
            left_out += 1
        else:
            yield made
    if left_out:
        logger.warning("%s: %d conversations in which no human speaks, left out", path, left_out)


def _entries(text: str, path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of lines, or of a list, with their places."""
    if text.lstrip().startswith("["):
        yield from _listed(text, path)
        return
    for where, line in numbered_lines(text, path):
        yield where, object_of(parse_json(line, where), where, line, _KEYS)


def _listed(text: str, path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    decoder = json.JSONDecoder()
    at, line = 0, 1

    def go_to(place: int) -> None:
        """Moves on, past the spaces there."""
        nonlocal at, line
        found = _SPACES.match(text, place)
        place = found.end() if found else place
        line += text.count("\n", at, place)
        at = place

    go_to(text.index("[") + 1)
    while text[at : at + 1] != "]":
        where = f"{path}:{line}"
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path}:{error.lineno}: is not JSON: {error.msg} (column {error.colno}); "
                + _BRACKETS
            ) from None
        except (RecursionError, ValueError) as error:
            raise UsageError(f"{where}: cannot be read: {error}") from None
        yield where, object_of(value, where, text[at:end], _KEYS, f"; {_BRACKETS}")
        go_to(end)
        if text[at : at + 1] == ",":
            go_to(at + 1)
        elif text[at : at + 1] != "]":
            raise UsageError(f"{path}:{line}: is not JSON: a comma or ] must follow in the list")
    if text[at + 1 :].strip():
        raise UsageError(f"{path}:{line}: is not JSON: something follows the list")


def _conversation(
    entry: dict[str, Any],
    where: str,
    recorded: Callable[[str], int] | None,
    trace: TraceReader,
    number: int,
) -> Conversation | None:
    """What an object says; None: a recorded conversation without a word of a human."""
    if isinstance(entry.get("body"), dict):
        entry = {"id": entry.get("custom_id"), **entry["body"]}
    forms = [form for form in _FORMS if form in entry]
    if len(forms) > 1 and forms != ["prompt", "turns"]:
        raise UsageError(f"{where}: has both `{forms[0]}` and `{forms[1]}`; leave one of them")
    if not forms:
        if not trace.has_lengths(entry):
            raise UsageError(f"{where}: has none of {_KEYS}; it has {', '.join(entry)}")
        return _timed_lengths(entry, where, trace, number)
    bound = _bound(entry, where) or trace.output_length(entry, where)
    system = entry.get("system")
    if system is not None and not isinstance(system, str):
        raise UsageError(f"{where}: `system` must be a text, not {system!r}")
    if forms[0] in ("prompt", "turns"):
        turns = [Turn(text, bound) for text in texts_of(entry, where)]
    else:
        spoken = _spoken(entry[forms[0]], forms[0], where)
        if spoken and spoken[0].role == "system":
            system = spoken.pop(0).text
        turns = _turns(spoken, where, forms[0], bound, recorded)
        if not turns and forms[0] == "conversations":
            return None
        if not turns:
            raise UsageError(f"{where}: `messages` has none of a user")
    id_, category = labels_of(entry)
    if category is not None and (
        isinstance(category, bool) or not isinstance(category, str | int | float)
    ):
        raise UsageError(f"{where}: `category` must be a text, not {category!r}")
    category = None if category is None else str(category)
    return Conversation(tuple(turns), id_, category, system, where, trace.at_s(entry, where))


def _timed_lengths(
    entry: dict[str, Any], where: str, trace: TraceReader, number: int
) -> Conversation:
    if not trace.has_lengths(entry):
        raise UsageError(f"{where}: has no column of input lengths; it has {', '.join(entry)}")
    turn = trace.turn(entry, where, number)
    id_ = entry.get("chat_id", number)
    return Conversation((turn,), id_, where=where, at_s=trace.at_s(entry, where))


def _bound(entry: dict[str, Any], where: str) -> int | None:
    for key in ("max_completion_tokens", "max_tokens"):
        value = entry.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{where}: `{key}` must be an integer of at least 1, not {value!r}")
        return value
    return None


class _Said(NamedTuple):
    role: str
    text: str


def _spoken(messages: Any, key: str, where: str) -> list[_Said]:
    """Who said what, in the words of either form."""
    role_key, text_key = ("role", "content") if key == "messages" else ("from", "value")
    if not isinstance(messages, list):
        raise UsageError(f"{where}: `{key}` must be a list, not {messages!r}")
    spoken = []
    for index, message in enumerate(messages):
        name = f"{where}: `{key}[{index}]`"
        if not isinstance(message, dict) or role_key not in message:
            raise UsageError(f"{name} must be an object with `{role_key}` and `{text_key}`")
        role = _ROLES.get(str(message[role_key]).lower())
        if role is None:
            raise UsageError(
                f"{name} is of {message[role_key]!r}; known are {', '.join(sorted(_ROLES))}"
            )
        content = message.get(text_key)
        if role == "assistant" and content is None:  # a call of a tool
            content = ""
        spoken.append(_Said(role, _text(content, f"{name}.{text_key}")))
    return spoken


def _text(content: Any, name: str) -> str:
    """A message's text, also where it comes in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [p.get("text") if isinstance(p, dict) else None for p in content]
        kinds = [p.get("type") if isinstance(p, dict) else None for p in content]
        if all(isinstance(t, str) for t in texts) and set(kinds) <= {"text"}:
            return "".join(map(str, texts))
    raise UsageError(f"{name} must be a text, or parts that are texts")


def _turns(
    spoken: list[_Said],
    where: str,
    key: str,
    bound: int | None,
    recorded: Callable[[str], int] | None,
) -> list[Turn]:
    """The users' turns; those whose recorded answer is counted are bounded by it."""
    turns = []
    for index, (role, text) in enumerate(spoken):
        if role == "system":
            raise UsageError(f"{where}: `{key}` has a system message behind the first message")
        if role == "user":
            rest = itertools.takewhile(lambda said: said.role == "assistant", spoken[index + 1 :])
            answer = "".join(said.text for said in rest)
            most = max(recorded(answer), 1) if recorded is not None and answer else bound
            turns.append(Turn(text, most))
    return turns
