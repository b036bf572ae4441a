"""Parsing words and running a command: errors in one line, exit codes."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from inferlab.errors import describe_error

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

Run = Callable[[argparse.Namespace], int]


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line and without abbreviated flags (``--k`` is not ``--K``)."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message} (flags: {self.prog} --help)\n")


def call(run: Run, args: argparse.Namespace) -> int:
    """Runs a command; what goes wrong becomes one line on stderr and an exit code.

    2: bad input (ValueError, a missing file), 1: a failure, 130: Ctrl-C. With ``--verbose`` the
    traceback is printed, too. Characters that stdout's encoding lacks are printed as question
    marks.
    """
    try:
        with _lenient_stdout():
            code = run(args)
            sys.stdout.flush()  # a reader that has gone shows here, not while Python shuts down
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our stdout (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    except Exception as error:
        if getattr(args, "verbose", False):
            traceback.print_exc()
        bad_input = isinstance(error, ValueError | FileNotFoundError | NotADirectoryError)
        print(f"error: {describe_error(error)}", file=sys.stderr)
        return EXIT_BAD_INPUT if bad_input else EXIT_FAILURE


@contextlib.contextmanager
def _lenient_stdout() -> Iterator[None]:
    """What stdout cannot encode is replaced meanwhile, unless PYTHONIOENCODING says what to do."""
    out = sys.stdout
    if not isinstance(out, io.TextIOWrapper) or out.errors not in ("strict", "surrogateescape"):
        yield
        return
    before = out.errors
    out.reconfigure(errors="replace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # its reader has gone, or it is closed
            out.reconfigure(errors=before)
