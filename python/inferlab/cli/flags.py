"""Flags that several commands have, and the configuration values that they stand for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, get_args

from inferlab.config_types import LogLevel


def add_output_arguments(parser: argparse.ArgumentParser, *, output: str | None = "JSON") -> None:
    """``--json``, ``--output`` (of the format named), ``--no-progress`` and how to log."""
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, nothing else, on stdout"
    )
    if output:
        parser.add_argument(
            "--output",
            metavar="FILE",
            help=f"write the result to FILE as {output}; until then what is finished is in "
            "FILE.part, a JSON line each",
        )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    add_log_arguments(parser)


def add_log_arguments(parser: argparse.ArgumentParser) -> None:
    """``--log-level`` and ``--verbose``, which every command has."""
    parser.add_argument(
        "--log-level", choices=get_args(LogLevel), help="what is logged on stderr (INFO)"
    )
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
