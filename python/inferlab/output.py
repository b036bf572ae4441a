"""Results as files and JSON: what JSON lacks is replaced, files are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from inferlab.errors import UsageError


def to_json(payload: Any, indent: int | None = None) -> str:
    """JSON text of results; arrays, tuples, mappings and paths become what JSON has for them.

    NaN and infinities, which JSON lacks, become null; half of a surrogate pair stays an escape, so
    that the text can be encoded; what is nested deeper than 100 levels becomes "...".
    """
    text = json.dumps(_plain(payload), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def print_json(payload: Any, out: TextIO, indent: int | None = None) -> None:
    """Prints JSON; as ASCII with escapes where the encoding of ``out`` lacks a character of it."""
    text = to_json(payload, indent)
    try:
        text.encode(out.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=indent)
    print(text, file=out)


def _plain(value: Any, levels: int = 100) -> Any:
    if levels == 0:
        return "..."
    if isinstance(value, float):
        return value if value - value == 0.0 else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, levels - 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, levels - 1) for item in value]
    if hasattr(value, "tolist"):  # a NumPy or torch value
        return _plain(value.tolist(), levels)
    return str(value)


def write_json(path: str | Path, payload: Any) -> None:
    """Writes ``payload`` to a file, whole or not at all.

    Raises:
        UsageError: the file cannot be written.
    """
    write_text(path, to_json(payload, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text to a file of ``--output``, whole or not at all; half of a surrogate pair
    becomes an escape.

    Raises:
        UsageError: the file cannot be written.
    """
    target = Path(path)
    partial = target.with_name(target.name + ".part")
    try:
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))
        partial.replace(target)
    except OSError as error:
        raise UsageError(f"--output: {path} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # that it is gone already is the rule
            partial.unlink()


def check_output(path: str | None) -> None:
    """Refuses an ``--output`` that cannot be written before the work is done, not after it.

    Raises:
        UsageError: its directory does not exist, or it is a directory itself.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise UsageError(f"--output: {path} is a directory; give a file")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"--output: {path}: its directory does not exist")
