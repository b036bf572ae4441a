"""`inferlab chat`: a conversation at the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from inferlab.cli.flags import add_config_argument, add_log_arguments
from inferlab.cli.parser import EXIT_OK
from inferlab.cli.specdec_flags import (
    add_model_arguments,
    add_sampling_arguments,
    add_speculation_arguments,
    given_overrides,
)
from inferlab.cli.terminal import setup_logging, show_line, show_piece
from inferlab.config import SpecdecConfig, load_config
from inferlab.errors import Interrupted, describe_error

YOU = "> "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab chat``."""
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_config_argument(parser, "configs/specdec.yaml")
    add_model_arguments(parser)
    add_speculation_arguments(parser)
    add_sampling_arguments(parser)
    add_log_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab chat``: a line is a message; Ctrl-C ends an answer, Ctrl-D the talk."""
    overrides, names = given_overrides(args)
    config = load_config(SpecdecConfig, args.config, overrides, names=names)
    setup_logging(config.log_level, args.verbose or config.verbose)
    from inferlab.specdec.pipeline import GenerationError, SpeculativePipeline

    pipeline = SpeculativePipeline(config=config)
    talk: list[dict[str, Any]] = []
    if args.system is not None:
        talk.append({"role": "system", "content": args.system})
    pipeline.chat_prompt([*talk, {"role": "user", "content": "."}])  # refused now or never
    if sys.stdin.isatty():
        show_line(["a line is a message", "Ctrl-C ends an answer", "Ctrl-D ends the talk"])
    while (message := _next_message()) is not None:
        talk.append({"role": "user", "content": message})
        try:
            _make_room(pipeline, talk)
            talk.append({"role": "assistant", "content": _answer(pipeline, talk)})
        except (ValueError, GenerationError) as error:
            print(f"error: {describe_error(error)}", file=sys.stderr)
            talk.pop()  # as if it had not been said
    return EXIT_OK


def _next_message() -> str | None:
    """The next line that is not empty; None at the end."""
    while True:
        try:
            line = input(YOU if sys.stdin.isatty() else "")
        except EOFError:
            return None
        if line.strip():
            return line


def _make_room(pipeline: Any, talk: list[dict[str, Any]]) -> None:
    """Forgets the oldest messages, but the system's, while all of them are too many."""
    said = [i for i, message in enumerate(talk) if message["role"] != "system"]
    first, pairs = said[0], len(said) // 2
    forgotten = 0
    while forgotten < pairs and not _fits(pipeline, talk):
        del talk[first : first + 2]  # a message and its answer
        forgotten += 1
    if forgotten:
        show_line([f"no room for all that was said: the oldest {2 * forgotten} messages are gone"])


def _fits(pipeline: Any, talk: list[dict[str, Any]]) -> bool:
    from inferlab.scheduler import Request
    from inferlab.types import SamplingParams

    params = SamplingParams(max_tokens=pipeline.config.max_new_tokens)
    request = Request(pipeline.chat_prompt(talk), params)
    try:
        pipeline.engine.check(request)
    except ValueError:
        return False
    return True


def _answer(pipeline: Any, talk: list[dict[str, Any]]) -> str:
    """Prints the answer as it comes, and figures; what there is of it after Ctrl-C."""
    try:
        result = pipeline.generate(messages=talk, on_token=lambda piece: show_piece(piece.text))
    except Interrupted as interrupt:
        (result,) = interrupt.results
    show_piece("\n")
    show_line(
        [
            f"{result['num_tokens']} tokens ({result['finish_reason']})",
            f"{result['tokens_per_second']:.1f} tokens/s",
            f"accepted length {result['mean_accepted_length']:.2f}",
        ]
    )
    return str(result["text"])
