"""Results of one prompt or many: run them, keep what there is on Ctrl-C, print and write them."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TextIO, TypeVar

from typing_extensions import NotRequired, TypedDict

from inferlab.cli.parser import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK
from inferlab.cli.terminal import progress, show_heading, show_line, show_text
from inferlab.errors import describe_error
from inferlab.output import Journal, print_json, write_json
from inferlab.prompts import Prompt
from inferlab.records import record_of, tokens_per_second, total_stats

logger = logging.getLogger(__name__)

Result = dict[str, Any]
ResultT = TypeVar("ResultT")
OnResult = Callable[[int, Mapping[str, Any]], None]
Generate = Callable[[list[str], OnResult], Sequence[Mapping[str, Any]]]
"""Texts -> results; calls the function with index and result of those that are done early."""


class Labels(TypedDict):
    """What every result has of its prompt; ``id`` and ``category`` are what the file says."""

    prompt: str
    id: NotRequired[Any]
    category: NotRequired[Any]


class Failed(Labels):
    """Stands in the place of the result of a prompt that could not be run."""

    error: str


class Summary(TypedDict):
    """See `Collected.summary`; acceptance is told by the engine only."""

    prompts: int
    errors: int
    interrupted: bool
    num_tokens: int
    wall_ms: float
    tokens_per_second: float
    acceptance_rate: NotRequired[float]
    mean_accepted_length: NotRequired[float]


class Many(TypedDict, Generic[ResultT]):
    """The JSON of ``--prompts``."""

    results: list[ResultT]
    summary: Summary


class Collected:
    """The results of many prompts as they come in.

    Args:
        journal: takes each result as soon as it is there.

    Attributes:
        results: one mapping per prompt that was begun, in the prompts' order: the runner's result
            with ``prompt`` and the file's ``id`` and ``category``, or these with ``error``.
        interrupted: Ctrl-C ended the run before its time.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.results: list[Result] = []
        self.interrupted = False
        self.wall_ms = 0.0
        self._kept: set[int] = set()

    def keep(self, index: int, result: Result) -> None:
        """Puts the result of a prompt into the journal, once."""
        if index not in self._kept:
            self._kept.add(index)
            self.journal.add(result)

    @property
    def failed(self) -> bool:
        return any("error" in result for result in self.results)

    def summary(self) -> Summary:
        """Totals over the prompts: tokens over wall time, acceptance over all steps."""
        good = [result for result in self.results if "error" not in result]
        tokens = sum(int(result["num_tokens"]) for result in good)
        summary: Summary = {
            "prompts": len(self.results),
            "errors": len(self.results) - len(good),
            "interrupted": self.interrupted,
            "num_tokens": tokens,
            "wall_ms": self.wall_ms,
            "tokens_per_second": tokens_per_second(tokens, self.wall_ms),
        }
        records = [record_of(result) for result in good]
        if any(record.speculation is not None for record in records):
            stats = total_stats(records)
            summary["acceptance_rate"] = stats.acceptance_rate
            summary["mean_accepted_length"] = stats.mean_accepted_length
        return summary


def run_prompts(
    prompts: Sequence[Prompt],
    generate: Generate,
    args: argparse.Namespace,
    batch_size: int = 1,
) -> Collected:
    """Runs ``generate`` on the prompts, ``batch_size`` at a time, with a progress bar.

    The error of ``--prompt`` is raised. Of ``--prompts`` each fails alone, whatever the reason: it
    becomes a result with ``error``, which names its line, and all others are answered. On Ctrl-C
    (KeyboardInterrupt, whose ``results`` are kept where it carries some) what there is is returned.

    Where there is an ``--output`` each result stands in its journal as soon as it is there, until
    :func:`report` has written the whole.

    Raises:
        UsageError: the journal cannot be written.
    """
    collected = Collected(Journal(args.output))
    if args.prompts is not None and collected.journal.path is not None:
        logger.info("results are in %s while it runs", collected.journal.path)

    def on_result(index: int, result: Mapping[str, Any]) -> None:
        if "error" not in result:  # an error is told once, in its turn
            collected.keep(index, _labelled(prompts[index], result))

    def collect(index: int, result: Mapping[str, Any]) -> None:
        labelled = _labelled(prompts[index], result)
        collected.results.append(labelled)
        collected.keep(index, labelled)

    start = time.perf_counter()
    try:
        with progress(len(prompts), "prompts", not args.no_progress) as advance:
            for first in range(0, len(prompts), batch_size):
                chunk = list(enumerate(prompts[first : first + batch_size], start=first))
                alone = args.prompts is None
                for index, result in _run_chunk(chunk, generate, on_result, alone=alone):
                    collect(index, result)
                advance(len(chunk))
                logger.debug("%d of %d prompts done", len(collected.results), len(prompts))
    except KeyboardInterrupt as interrupt:
        collected.interrupted = True
        first = len(collected.results)
        for index, result in enumerate(getattr(interrupt, "results", []), start=first):
            collect(index, result)
    except BaseException:
        collected.journal.close(written=False)
        raise
    collected.wall_ms = (time.perf_counter() - start) * 1e3
    return collected


def _run_chunk(
    chunk: Sequence[tuple[int, Prompt]], generate: Generate, on_result: OnResult, *, alone: bool
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The result of each prompt, by its index, in order; a chunk that fails as a whole is tried by
    halves."""
    indices = [index for index, _ in chunk]
    try:
        for _, prompt in chunk:
            prompt.check()
        texts = [prompt.text for _, prompt in chunk]
        results = generate(texts, lambda place, result: on_result(indices[place], result))
    except Exception as error:
        known = getattr(error, "results", None)
        if alone and known is not None:  # its text counts prompts, and here is one
            raise RuntimeError(known[0]["error"]) from error
        if alone:
            raise
        if known is None and len(chunk) > 1:
            half = len(chunk) // 2
            yield from _run_chunk(chunk[:half], generate, on_result, alone=False)
            yield from _run_chunk(chunk[half:], generate, on_result, alone=False)
            return
        if known is None:
            logger.debug("the traceback", exc_info=error)
        results = [{"error": describe_error(error)}] if known is None else known
    yield from zip(indices, results, strict=True)


def _labelled(prompt: Prompt, result: Mapping[str, Any]) -> Result:
    labelled = {**prompt.labels(), **result, "prompt": prompt.text}
    if "error" in result and prompt.where is not None:
        labelled["error"] = f"{prompt.where}: {result['error']}"
    if "error" in result:
        logger.error("%s", labelled["error"])
    return labelled


def report(
    collected: Collected,
    args: argparse.Namespace,
    out: TextIO,
    show: Callable[[Result], None],
) -> int:
    """Writes and prints what was collected; returns the exit code. Where it cannot be written it is
    printed all the same, and the journal stays.

    With ``--prompt``: the mapping of that prompt. With ``--prompts``:
    ``{"results": [...], "summary": {...}}``.

    Args:
        out: the true stdout, for ``--json``.
        show: prints one result for people.
    """
    many = args.prompts is not None
    payload: Any = {"results": collected.results, "summary": collected.summary()}
    if not many:
        payload = collected.results[0] if collected.results else None
    try:
        if args.output and payload is not None:
            write_json(args.output, payload)
        collected.journal.close(written=True)
    except Exception:
        collected.journal.close(written=False)
        raise
    finally:
        if not args.json:
            for result in collected.results:
                show(result)
            if many:
                _show_summary(payload["summary"])
        elif payload is not None:
            print_json(payload, out)
    if collected.interrupted:
        logger.warning("interrupted; kept %d results", len(collected.results))
        return EXIT_INTERRUPTED
    return EXIT_FAILURE if collected.failed else EXIT_OK


def show_result(result: Result, shown: bool) -> bool:
    """Prints what results of all commands have: whose it is, and its text, unless that was
    ``shown`` as it came, or its error; whether there are figures to follow."""
    if "id" in result:
        show_heading(str(result["id"]))
    if "error" in result:
        show_line([f"error: {result['error']}"])
        return False
    show_text("" if shown else result["text"])
    return True


def _show_summary(summary: Mapping[str, Any]) -> None:
    parts = [
        f"{summary['prompts']} prompts",
        f"{summary['num_tokens']} tokens",
        f"{summary['tokens_per_second']:.1f} tokens/s",
    ]
    if "acceptance_rate" in summary:
        parts.append(f"acceptance {summary['acceptance_rate']:.3f}")
        parts.append(f"accepted length {summary['mean_accepted_length']:.2f}")
    if summary["errors"]:
        parts.append(f"{summary['errors']} failed")
    if summary["interrupted"]:
        parts.append("interrupted")
    show_heading("summary")
    show_line(parts)
