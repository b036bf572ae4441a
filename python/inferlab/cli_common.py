"""What all commands share: flags, one-line errors, logs, JSON on stdout, prompt files, progress."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TextIO

from inferlab.types import check_text

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

Run = Callable[[argparse.Namespace], int]


class UsageError(ValueError):
    """Bad input of the user's; its text is the whole message."""


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line and without abbreviated flags (``--k`` is not ``--K``)."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"error: {message} (flags: {self.prog} --help)\n")


def command_main(
    name: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Run,
    argv: Sequence[str] | None,
) -> int:
    """The ``main`` of a command's module: parses ``argv``, runs, returns the exit code."""
    parser = Parser(prog=f"inferlab {name}", description=description)
    add_arguments(parser)
    return call(run, parser.parse_args(argv))


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


def describe_error(error: Exception) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError | RuntimeError | OSError | MemoryError):
        return text
    # A fault of ours, not the user's.
    return f"{type(error).__name__}: {text} (--verbose prints the traceback)"


def add_output_arguments(parser: argparse.ArgumentParser, *, output: str | None = "JSON") -> None:
    """``--json``, ``--output`` (of the format named), ``--no-progress`` and ``--verbose``."""
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, nothing else, on stdout"
    )
    if output:
        parser.add_argument(
            "--output", metavar="FILE", help=f"write the result to FILE as {output}"
        )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.add_argument(
        "--verbose", action="store_true", help="log everything, and tracebacks of errors"
    )


def add_config_argument(parser: argparse.ArgumentParser, example: str) -> None:
    """``--config FILE``."""
    parser.add_argument(
        "--config", metavar="FILE", help=f"YAML file, such as {example}; flags beat what it says"
    )


def add_safety_arguments(parser: argparse._ActionsContainer) -> None:
    """What is refused of a checkpoint unless it is asked for by name; a parser or a group."""
    parser.add_argument(
        "--max-memory-mb", type=float, metavar="MB", help="refuse models with larger weights"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python files of the checkpoint"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read pytorch_model.bin, which can run code"
    )


def add_generation_config_argument(parser: argparse._ActionsContainer) -> None:
    """Whether a checkpoint's own rules for its tokens count; a parser or a group."""
    parser.add_argument(
        "--ignore-generation-config",
        action="store_true",
        help="follow the token ids of the checkpoint's generation_config.json only, not its "
        "suppress_tokens and the like",
    )


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """``--prompt TEXT`` or ``--prompts FILE``; :func:`gather_prompts` reads them."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--prompt", metavar="TEXT", help="the prompt")
    group.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help="many prompts: a JSON object a line, with `prompt`, or with `turns` as in Spec-Bench "
        "(the first turn is taken); - reads stdin",
    )


def given_values(
    args: argparse.Namespace, flags: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration values that the user gave by flag.

    Args:
        flags: flag -> configuration key, e.g. ``{"--max-tokens": "max_new_tokens"}``.

    Returns:
        ``(overrides, names)`` for :func:`inferlab.config.load_config`.
    """
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    for flag, key in flags.items():
        value = getattr(args, flag.lstrip("-").replace("-", "_"), None)
        if value is not None and value is not False:
            values[key] = value
            names[key] = flag
    return values, names


# --- prompts ------------------------------------------------------------------------------------


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


def gather_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of ``--prompt`` or ``--prompts``.

    Raises:
        ValueError: a prompt that is empty or cannot be encoded, a missing file, a bad line (file
            and line are named).
    """
    if args.prompts is not None:
        return read_prompts(args.prompts)
    if not args.prompt.strip():
        raise UsageError("--prompt: is empty; give a text")
    check_text("--prompt", args.prompt)
    return [Prompt(args.prompt)]


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


# --- output -------------------------------------------------------------------------------------


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


@contextlib.contextmanager
def progress(total: int, label: str, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where that is a terminal; yields ``advance(n)``.

    One step is too few for a bar.
    """
    if not enabled or total < 2 or not sys.stderr.isatty():
        yield lambda n: None
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
