"""Tokens counted again: the server's ``usage`` against a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from inferlab.load.metrics import in_load
from inferlab.load.outputs import Recount
from inferlab.records import RequestRecord


def recount(records: Iterable[RequestRecord], tokenizer: Any, name: str) -> Recount:
    """Tokens of the answers' texts by a tokenizer (special tokens are none) beside the server's.

    They differ by an end token, which has no text, and where the model did not write a text the
    way in which the tokenizer splits it. What has no usage, failed, or holds reasoning, whose text
    is not kept, is not compared. Prompts are, of text completions and their first turns: others go
    through a chat template, or hold what was said before.
    """
    found: Recount = {
        "tokenizer": name,
        "requests": 0,
        "by_usage": 0,
        "by_tokenizer": 0,
        "differing": 0,
        "largest_difference": 0,
        "not_compared": 0,
        "prompts": 0,
        "prompts_by_usage": 0,
        "prompts_by_tokenizer": 0,
    }

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    for record in records:
        reasoned = record.first_token_ms != in_load(record).first_content_ms
        if record.error is not None or record.counted_by != "usage" or reasoned:
            found["not_compared"] += 1
            continue
        tokens = count(record.text)
        difference = tokens - record.num_tokens
        found["requests"] += 1
        found["by_usage"] += record.num_tokens
        found["by_tokenizer"] += tokens
        found["differing"] += difference != 0
        if abs(difference) > abs(found["largest_difference"]):
            found["largest_difference"] = difference
        plain = record.exchange is not None and record.exchange.endpoint == "completions"
        if plain and in_load(record).turn == 0 and record.prompt_tokens is not None:
            found["prompts"] += 1
            found["prompts_by_usage"] += record.prompt_tokens
            found["prompts_by_tokenizer"] += count(record.prompt or "")
    return found
