"""Results as files and JSON: what JSON lacks is replaced; files are written whole or not at all,
and what is finished stands beside them until they are."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import stat
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TextIO

from inferlab.errors import UsageError

logger = logging.getLogger(__name__)


def to_json(payload: Any, indent: int | None = None) -> str:
    """JSON text of results; arrays, tuples, mappings and paths become what JSON has for them.

    NaN and infinities, which JSON lacks, become null; half of a surrogate pair stays an escape, so
    that the text can be encoded; what is nested deeper than 100 levels becomes "...".
    """
    text = json.dumps(_plain(payload), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def refuse_constant(name: str) -> NoReturn:
    """Of ``json.loads``, as ``parse_constant``: NaN and infinities are Python's, not JSON's."""
    raise ValueError(f"{name} is no number of JSON")


def differences(
    one: Any, other: Any, where: str = "", skip: Collection[str] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """Where two values of JSON types differ: the path, ``a.b[3]``, and what stands there.

    Args:
        skip: keys that are not compared, at any depth.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            if key not in skip:
                path = f"{where}.{key}".strip(".")
                yield from differences(one.get(key), other.get(key), path, skip)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield where, one, other
            return
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from differences(left, right, f"{where}[{index}]", skip)
    elif one != other:
        yield where, one, other


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


def write_json(path: str | Path, payload: Any, flag: str = "--output") -> None:
    """Writes ``payload`` to a file, as `write_text` does.

    Raises:
        UsageError: the file cannot be written.
    """
    write_text(path, to_json(payload, indent=2) + "\n", flag)


def write_text(path: str | Path, text: str, flag: str = "--output") -> None:
    """Writes UTF-8 text to the file of a ``flag``, whole or not at all; half of a surrogate pair
    becomes an escape.

    A link stays one: the file that it points to is replaced, and keeps its permissions. Devices,
    FIFOs and this process's own stdout are written to, not replaced.

    Raises:
        UsageError: the file cannot be written.
    """
    data = text.encode("utf-8", "backslashreplace")
    try:
        if (stream := _own_stream(path)) is not None:
            stream.flush()
            stream.buffer.write(data)
            stream.buffer.flush()
        elif is_special(path):
            Path(path).write_bytes(data)
        else:
            replace_file(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise _cannot_be_written(path, error, flag) from None


def is_special(path: str | Path) -> bool:
    """Whether there is something that is neither a file nor a folder: a device, FIFO or socket."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def check_output(path: str | Path | None, flag: str = "--output") -> None:
    """Refuses the file of a ``flag`` that cannot be written before the work is done, not after it.

    Raises:
        UsageError: its directory does not exist, it is a directory itself, or the permission for
            it is missing.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise UsageError(f"{flag}: {path} is a directory; give a file")
    folder = Path(os.path.realpath(path)).parent
    if not is_special(path) and not folder.is_dir():
        raise UsageError(f"{flag}: {path}: its directory does not exist")
    if not os.access(path if is_special(path) else folder, os.W_OK):
        raise UsageError(f"{flag}: {path} cannot be written: permission denied")


class Journal:
    """What is finished of a run, a JSON line each, in FILE.part beside FILE of ``--output``.

    It is there while FILE is not: a process that is killed loses no result but the one that it was
    at. The next run of the same ``--output`` begins it anew. What is written to a device or a FIFO
    has none; beside a link it stands where the file is that the link points to.

    Attributes:
        path: of FILE.part; None where there is none.

    Args:
        output: FILE; None: everything here does nothing.

    Raises:
        UsageError: FILE.part cannot be written.
    """

    def __init__(self, output: str | Path | None) -> None:
        self.path: Path | None = None
        self._used = False
        if output is None or is_special(output):
            return
        target = Path(os.path.realpath(output))
        path = target.with_name(target.name + ".part")
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UsageError(f"--output: {path} is in the way: finished results go there meanwhile")
        try:
            self._file = path.open("wb", buffering=0)
        except OSError as error:
            raise _cannot_be_written(output, error) from None
        self.path = path

    def add(self, entry: Any) -> None:
        """Writes a line. A disk that is full costs no result: the journal ends there."""
        if self.path is None or self._file.closed:
            return
        try:
            self._file.write((to_json(entry) + "\n").encode())
            self._used = True
        except OSError as error:
            logger.warning("%s ends here: %s", self.path, error.strerror or error)
            self._file.close()

    def close(self, *, written: bool) -> None:
        """Ends it. It goes where FILE is ``written`` or nothing was finished; else it stays, and
        the log says where."""
        if self.path is None:
            return
        self._file.close()
        if self._used and not written:
            logger.error("what was finished is in %s, a JSON line each", self.path)
        else:
            self.path.unlink(missing_ok=True)
        self.path = None


def _own_stream(path: str | Path) -> TextIO | None:
    """This process's stdout or stderr, where ``path`` is what it goes to (``/dev/stdout``)."""
    for stream in (sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):  # closed, or no such file
            if stream is not None and os.path.samestat(os.stat(path), os.fstat(stream.fileno())):
                return stream
    return None


def replace_file(target: Path, data: bytes) -> None:
    """Writes all of it or nothing. Raises OSError."""
    temporary = target.with_name(f".inferlab-{secrets.token_hex(6)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
        with contextlib.suppress(FileNotFoundError):
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _cannot_be_written(path: str | Path, error: OSError, flag: str = "--output") -> UsageError:
    return UsageError(f"{flag}: {path} cannot be written: {error.strerror or error}")
