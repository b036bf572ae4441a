"""What a person sees: logs and progress on stderr; headings, texts and figures on stdout."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

LINE_EVERY_S = 30.0
"""Between lines that tell of progress where stderr is no terminal."""


class _StderrHandler(logging.StreamHandler):
    """Writes to what sys.stderr is at that moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def setup_logging(level: str = "INFO", verbose: bool = False) -> None:
    """The package's log goes to stderr; other libraries' chatter only with ``verbose``."""
    logger = logging.getLogger("inferlab")
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
    logger.setLevel("DEBUG" if verbose else level)
    if not verbose:
        _quiet_libraries()


def _quiet_libraries() -> None:
    """No progress bars and no chatter of transformers, imported already or not."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def clean_stdout(wanted: bool = True) -> Iterator[TextIO]:
    """Yields the true stdout; whatever else prints in the meantime goes to stderr.

    So a library that prints cannot spoil the JSON of ``--json``. Not ``wanted``: changes nothing.
    """
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield out


@contextlib.contextmanager
def progress(total: int, label: str, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal, elsewhere a line now and then; yields
    ``advance(n)``.

    One step is too few for either.
    """
    if not enabled or total < 2:
        yield lambda n: None
        return
    if not sys.stderr.isatty():
        yield _told_by_lines(total, label)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)


def _told_by_lines(total: int, label: str) -> Callable[[int], None]:
    done, told = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, told
        done += n
        if time.monotonic() - told >= LINE_EVERY_S:
            told = time.monotonic()
            print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)

    return advance


def show_heading(text: str) -> None:
    """A rule with a title on stdout."""
    from rich.console import Console

    Console().rule(text, align="left", style="dim")


def show_text(text: str) -> None:
    """Generated text on stdout, character by character as it is."""
    show_piece(text + "\n")


def shows_live(args: argparse.Namespace) -> bool:
    """Whether text is shown as it comes: that of one prompt, to a person."""
    return not args.json and args.prompts is None and sys.stdout.isatty()


def show_piece(text: str) -> None:
    """Some more text on stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def show_line(parts: Sequence[str]) -> None:
    """Figures on one line, dimmed where stdout is a terminal."""
    from rich.console import Console

    line = " · ".join(parts)
    Console().print(line, markup=False, highlight=False, soft_wrap=True, style="dim")
