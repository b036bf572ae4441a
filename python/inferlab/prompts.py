"""Prompts: one, or a JSON-lines file of them."""

from __future__ import annotations

import json
import sys
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
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is not UTF-8 text: {error}") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from None
    prompts = [
        _parse_prompt(line, f"{path}:{number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not prompts:
        raise UsageError(f"{path}: holds no prompts; give one JSON object a line")
    return prompts


def _parse_prompt(line: str, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: is not JSON: {error.msg} (column {error.colno})") from None
    if not isinstance(entry, dict):
        raise UsageError(
            f"{where}: must be an object with `prompt` or `turns`, not {line.strip()[:60]}"
        )
    if "prompt" in entry:
        key, text = "prompt", entry["prompt"]
    elif "turns" in entry:
        turns = entry["turns"]
        if not isinstance(turns, list) or not turns:
            raise UsageError(f"{where}: `turns` must be a list with at least one text")
        key, text = "turns[0]", turns[0]
    else:
        raise UsageError(f"{where}: has neither `prompt` nor `turns`; it has {', '.join(entry)}")
    if not isinstance(text, str):
        raise UsageError(f"{where}: `{key}` must be a text, not {text!r}")
    return Prompt(text, entry.get("id", entry.get("question_id")), entry.get("category"), where)
