"""What a request begins with: others that begin so are best answered where that was read."""

from __future__ import annotations

import json
from typing import Any

CHARACTERS = 256
TOKENS = 64
"""How much of a beginning counts. What is shared beyond it leads to the same replica all the more;
who shares less has little to gain."""


def beginning(body: bytes) -> str | None:
    """The first characters, or token ids, of a request's text; None: there is none.

    A ``prompt_cache_key`` of the client stands for the text, as in OpenAI's API.
    """
    try:
        return _beginning(json.loads(body)) or None
    except (ValueError, RecursionError):
        return None


def _beginning(asked: Any) -> str:
    if not isinstance(asked, dict):
        return ""
    if key := asked.get("prompt_cache_key"):
        return f"key {key}"[:CHARACTERS]
    for name in ("prompt", "messages", "input"):
        if name in asked:
            return (_text(asked.get("instructions")) + _text(asked[name]))[:CHARACTERS]
    return ""


def _text(part: Any) -> str:
    """The beginning of a prompt or of a conversation, of the first of several prompts."""
    if isinstance(part, str):
        return part[:CHARACTERS]
    if isinstance(part, dict):
        return f"{part.get('role', '')}:{_text(part.get('content', part.get('text')))}\n"
    if not isinstance(part, list) or not part:
        return ""
    if isinstance(part[0], int):
        return " ".join(map(str, part[:TOKENS]))
    if isinstance(part[0], dict):
        return "".join(map(_text, part[:CHARACTERS]))
    return _text(part[0])
