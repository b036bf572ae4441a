"""What goes wrong in a user's hands: bad input, Ctrl-C, and any error told in one line."""

from __future__ import annotations

from typing import Any


class UsageError(ValueError):
    """Bad input of the user's; its text is the whole message."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a generation. ``results`` holds what every request had produced by then."""

    def __init__(self, results: list[Any]) -> None:
        super().__init__("generation interrupted")
        self.results = results


def describe_error(error: Exception) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError | RuntimeError | OSError | MemoryError):
        return text
    # A fault of ours, not the user's.
    return f"{type(error).__name__}: {text} (--verbose prints the traceback)"
