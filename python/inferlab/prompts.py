"""Prompts: one, or a JSON-lines file of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inferlab.errors import UsageError
from inferlab.types import check_text


@dataclass(frozen=True)
class Prompt:
    """One prompt; ``id`` and ``category`` are the file's, where it has them.

    ``where`` is its place, ``FILE:LINE``, for messages.
    """

    text: str
    id: str | int | None = None
    category: str | None = None
    where: str | None = field(default=None, compare=False)

    def check(self) -> None:
        """Raises UsageError where no model could go on from it: it is empty or not encodable."""
        if not self.text.strip():
            raise UsageError("prompt is empty; give a text")
        check_text("prompt", self.text)

    def labels(self) -> dict[str, Any]:
        """``id`` and ``category``, those that are known."""
        pairs = (("id", self.id), ("category", self.category))
        return {key: value for key, value in pairs if value is not None}


def read_prompts(path: str | Path) -> list[Prompt]:
    """Reads a JSON-lines file of prompts; blank lines are skipped, ``-`` is stdin.

    A line is an object with ``prompt`` (and, if it likes, ``id`` and ``category``), or one in
    Spec-Bench's format: ``{"question_id": 81, "category": "writing", "turns": ["...", ...]}``.
    The encoding is UTF-8, with or without a byte-order mark. A line of another form spoils the
    file; a prompt that cannot be run (empty, too long, half of a surrogate pair) does not: it
    fails when its turn comes, alone.

    Raises:
        UsageError: no such file, no prompts in it, or a bad line; names file and line.
    """
    prompts = []
    for where, line in numbered_lines(read_text(path), path):
        entry = object_of(parse_json(line, where), where, line)
        prompts.append(Prompt(texts_of(entry, where)[0], *labels_of(entry), where))
    if not prompts:
        raise UsageError(f"{path}: holds no prompts; give one JSON object a line")
    return prompts


def read_text(path: str | Path) -> str:
    """A file's text, or that of stdin (``-``): UTF-8, with or without a byte-order mark.

    Raises:
        UsageError: it cannot be read, or is not UTF-8; names the file.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text: {error}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None


def numbered_lines(text: str, path: str | Path) -> Iterator[tuple[str, str]]:
    """``FILE:LINE`` and the line, for those that are not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def parse_json(text: str, where: str) -> Any:
    """Raises UsageError, which names the place, where a text is no JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: is not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise UsageError(f"{where}: cannot be read: its brackets are nested too deep") from None
    except ValueError as error:  # an integer of thousands of digits
        raise UsageError(f"{where}: cannot be read: {error}") from None


def object_of(
    value: Any, where: str, written: str, keys: str = "`prompt` or `turns`", remedy: str = ""
) -> Any:
    """The value, if it is a JSON object; ``written`` is how the file has it."""
    if not isinstance(value, dict):
        shown = written.strip()[:60]
        raise UsageError(f"{where}: must be an object with {keys}, not {shown}{remedy}")
    return value


def texts_of(entry: dict[str, Any], where: str) -> list[str]:
    """What is said in an entry with ``prompt``, or with ``turns``."""
    if "prompt" in entry:
        texts = {"prompt": entry["prompt"]}
    elif "turns" in entry:
        turns = entry["turns"]
        if not isinstance(turns, list) or not turns:
            raise UsageError(f"{where}: `turns` must be a list with at least one text")
        texts = {f"turns[{i}]": turn for i, turn in enumerate(turns)}
    else:
        raise UsageError(f"{where}: has neither `prompt` nor `turns`; it has {', '.join(entry)}")
    for key, text in texts.items():
        if not isinstance(text, str):
            raise UsageError(f"{where}: `{key}` must be a text, not {text!r}")
    return list(texts.values())


def labels_of(entry: dict[str, Any]) -> tuple[Any, Any]:
    """``id`` and ``category`` of an entry; Spec-Bench's ``question_id`` is one, too."""
    return entry.get("id", entry.get("question_id")), entry.get("category")
