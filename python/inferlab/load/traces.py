"""Traces: when requests came, how long they were, and which of them began alike.

Known without being told, by their own names:

- Mooncake's JSON lines (FAST25-release/traces of kvcache-ai/Mooncake): ``timestamp`` in
  milliseconds, ``input_length``, ``output_length``, ``hash_ids`` of blocks of 512 tokens;
- Qwen-Bailian's (alibaba-edu/qwen-bailian-usagetraces-anon), which have a ``chat_id``: the same
  names, seconds and blocks of 16 tokens;
- BurstGPT's CSV (HPMLL/BurstGPT): ``Timestamp`` in seconds, ``Request tokens``,
  ``Response tokens``;
- Azure's CSV (LLM inference traces of Azure/AzurePublicDataset): ``TIMESTAMP`` as date and time,
  ``ContextTokens``, ``GeneratedTokens``;
- Vidur's CSV (microsoft/vidur): ``arrived_at`` in seconds, ``num_prefill_tokens``,
  ``num_decode_tokens``.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import numpy as np

from inferlab.errors import UsageError
from inferlab.load.conversations import Conversation, Turn
from inferlab.load.synthetic import OWN, SHARED, Writer

UNITS = {"ms": 1e-3, "s": 1.0}

# Names as they are without case, spaces and underscores.
_TIMES = {"timestamp": None, "timestampms": "ms", "timestamps": "s", "arrivedat": "s"}
_INPUTS = ("inputlength", "requesttokens", "contexttokens", "numprefilltokens")
_OUTPUTS = ("outputlength", "responsetokens", "generatedtokens", "numdecodetokens")
_MOONCAKE_BLOCK, _BAILIAN_BLOCK = 512, 16


class TraceReader:
    """Reads what the lines of one trace tell.

    Args:
        writer: makes texts where a trace has lengths alone; None: such a line is an error.
        unit: "ms" or "s", of times given as numbers under names that do not tell it; None: that of
            the JSON formats above.
    """

    def __init__(self, writer: Writer | None = None, unit: str | None = None) -> None:
        if unit is not None and unit not in UNITS:
            raise UsageError(f"time unit: {unit!r} is unknown; known are {', '.join(UNITS)}")
        self._writer = writer
        self._unit = unit

    def at_s(self, entry: Mapping[str, Any], where: str) -> float | None:
        """The time of a line in seconds, from whatever beginning; None: it has none."""
        for key, value in entry.items():
            plain = _plain(key)
            if plain in _TIMES:
                unit = _TIMES[plain] or self._unit or ("s" if "chat_id" in entry else "ms")
                return _seconds(value, unit, f"{where}: `{key}`")
        return None

    def output_length(self, entry: Mapping[str, Any], where: str) -> int | None:
        """Tokens that were answered; None: not told."""
        key, value = _find(entry, _OUTPUTS)
        if key is None:
            return None
        count = _count(value, f"{where}: `{key}`")
        if count < 1:
            raise UsageError(
                f"{where}: `{key}` is 0, which is how requests that failed are recorded; take such "
                "lines out (BurstGPT has files without them)"
            )
        return count

    def has_lengths(self, entry: Mapping[str, Any]) -> bool:
        return _find(entry, _INPUTS)[0] is not None

    def turn(self, entry: Mapping[str, Any], where: str, number: int) -> Turn:
        """A text of the length that a line tells; it begins as others do where ``hash_ids`` say so.

        Args:
            number: of the line, for what is drawn.
        """
        key, value = _find(entry, _INPUTS)
        length = _count(value, f"{where}: `{key}`")
        if length < 1:
            raise UsageError(f"{where}: `{key}` must be at least 1")
        if self._writer is None:
            raise UsageError(
                f"{where}: has lengths and no text; give a tokenizer, with which texts of these "
                "lengths are made"
            )
        blocks = entry.get("hash_ids", [])
        if not isinstance(blocks, list) or not all(_is_count(block) for block in blocks):
            raise UsageError(f"{where}: `hash_ids` must be a list of integers of at least 0")
        size = _BAILIAN_BLOCK if "chat_id" in entry else _MOONCAKE_BLOCK
        shared = [self._writer.draws(size, SHARED, block) for block in blocks]
        own = self._writer.draws(max(length - size * len(blocks), 0), OWN, number)
        draws = np.concatenate([*shared, own])[:length]
        return Turn(self._writer.text(draws), self.output_length(entry, where))


def is_csv_trace(header: str) -> bool:
    """Whether a line names the columns of a trace."""
    return "," in header and any(_plain(name) in _TIMES for name in next(csv.reader([header])))


def csv_rows(text: str, path: object) -> Iterator[tuple[str, dict[str, str]]]:
    """``FILE:LINE`` and the row, for each row of a CSV file with a header.

    Raises:
        UsageError: a row of more or fewer columns than the header.
    """
    rows = csv.reader(io.StringIO(text, newline=""))
    header: list[str] | None = None
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = row
            continue
        where = f"{path}:{rows.line_num}"
        if len(row) != len(header):
            raise UsageError(f"{where}: has {len(row)} columns, the header {len(header)}")
        yield where, dict(zip(header, row, strict=True))


def in_order(conversations: Iterable[Conversation]) -> list[Conversation]:
    """By time, the first at 0 s; unchanged where none has a time.

    Raises:
        UsageError: some have times and some have none.
    """
    listed = list(conversations)
    times = [c.at_s for c in listed if c.at_s is not None]
    if not times:
        return listed
    if len(times) < len(listed):
        without = next(c for c in listed if c.at_s is None)
        raise UsageError(f"{without.where}: has no timestamp, but others have")
    start = min(times)
    moved = [replace(c, at_s=round(c.at_s - start, 6)) for c in listed if c.at_s is not None]
    return sorted(moved, key=lambda c: c.at_s or 0.0)


def _plain(key: str) -> str:
    return re.sub(r"[\s_]", "", key).lower()


def _find(entry: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str | None, Any]:
    return next(((key, v) for key, v in entry.items() if _plain(key) in names), (None, None))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _count(value: Any, name: str) -> int:
    if isinstance(value, str):
        value = int(value) if re.fullmatch(r"\s*\d+\s*", value) else value
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if not _is_count(value):
        raise UsageError(f"{name} must be an integer of at least 0, not {value!r}")
    return int(value)


def _seconds(value: Any, unit: str, name: str) -> float:
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return _date(value, name)
    good = isinstance(number, int | float) and not isinstance(number, bool)
    if not good or not abs(number) < 1e18:
        raise UsageError(f"{name} must be a number or a date with a time, not {value!r}")
    return float(number) * UNITS[unit]


def _date(value: str, name: str) -> float:
    # Python 3.10 knows neither Z nor fractions of other than 3 or 6 digits; Azure writes 7.
    text = re.sub(r"\.(\d+)", lambda found: "." + found[1][:6].ljust(6, "0"), value.strip())
    try:
        read = datetime.fromisoformat(re.sub(r"[zZ]\Z", "+00:00", text))
    except ValueError:
        raise UsageError(f"{name} must be a number or a date with a time, not {value!r}") from None
    return (read if read.tzinfo else read.replace(tzinfo=timezone.utc)).timestamp()
