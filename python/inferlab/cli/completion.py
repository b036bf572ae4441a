"""`inferlab --print-completion SHELL`: a script by which a shell completes commands and flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from inferlab.errors import UsageError

SHELLS = ("bash", "zsh", "tcsh")


class PrintCompletion(argparse.Action):
    """Prints the script and exits.

    Args:
        make_parser: makes the parser with the flags of all commands, which takes seconds.
    """

    def __init__(self, *args: Any, make_parser: Callable[[], argparse.ArgumentParser], **kw: Any):
        super().__init__(*args, **kw)
        self._make_parser = make_parser

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        print(completion_script(self._make_parser(), values))
        parser.exit()


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script; what follows a flag of a FILE or DIR is completed from the file system.

    Raises:
        UsageError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise UsageError(
            "--print-completion: needs shtab; pip install 'llm-inference-lab[completion]'"
        ) from None
    _mark_files(parser, {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY})
    _nest(parser)
    return shtab.complete(parser, shell)


def _nest(parser: argparse.ArgumentParser) -> None:
    """Puts commands of two words, one for argparse, below that of the first, as shells see them."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    below: dict[str, Any] = {}
    for name in [name for name in commands.choices if " " in name]:
        first, second = name.split()
        if first not in below:
            below[first] = commands.choices[first].add_subparsers()
        command = commands._name_parser_map.pop(name)
        (told,) = (a for a in commands._choices_actions if a.dest == name)
        commands._choices_actions.remove(told)
        below[first].add_parser(second, parents=[command], add_help=False, help=told.help)


def _mark_files(parser: argparse.ArgumentParser, kinds: dict[str, Any]) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_files(command, kinds)
        elif isinstance(action.metavar, str) and action.metavar.partition(".")[0] in kinds:
            action.complete = kinds[action.metavar.partition(".")[0]]  # type: ignore[attr-defined]
