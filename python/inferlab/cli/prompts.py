"""The flags that name prompts, and the prompts that they name."""

from __future__ import annotations

import argparse

from inferlab.errors import UsageError
from inferlab.prompts import Prompt, read_prompts
from inferlab.types import check_text


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """``--prompt TEXT`` or ``--prompts FILE``; :func:`gather_prompts` reads them."""
    _add_prompt_or_prompts(parser.add_mutually_exclusive_group(required=True))


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


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """``--prompt``, ``--prompts`` or ``--heldout``; :func:`gather_workload` reads them."""
    group = parser.add_mutually_exclusive_group()
    _add_prompt_or_prompts(group)
    group.add_argument(
        "--heldout",
        type=int,
        metavar="N",
        help="N prompts from files of the standard library that the bundled models never saw",
    )
    parser.add_argument(
        "--num-prompts", type=int, metavar="N", help="of --prompts take the first N only"
    )


def gather_workload(args: argparse.Namespace) -> list[Prompt]:
    """The prompts that the flags ask for.

    Raises:
        ValueError: a prompt that is empty or cannot be encoded, a bad file, or a number below 1;
            the flag is named.
    """
    for flag, value in (("--heldout", args.heldout), ("--num-prompts", args.num_prompts)):
        if value is not None and value < 1:
            raise UsageError(f"{flag}: {value} is not allowed; must be at least 1")
    if args.num_prompts is not None and args.prompts is None:
        raise UsageError("--num-prompts: limits --prompts; give it with --prompts")
    if args.prompts is not None:
        return read_prompts(args.prompts)[: args.num_prompts]
    if args.heldout is not None:
        from inferlab.training.material.corpus import heldout_prompts

        texts = heldout_prompts(args.heldout)
        return [Prompt(text, id=index) for index, text in enumerate(texts)]
    if args.prompt is None:
        raise UsageError("one of --prompt, --prompts and --heldout is required")
    return gather_prompts(args)


def _add_prompt_or_prompts(group: argparse._MutuallyExclusiveGroup) -> None:
    group.add_argument("--prompt", metavar="TEXT", help="the prompt")
    group.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help="many prompts: a JSON object a line, with `prompt`, or with `turns` as in Spec-Bench "
        "(the first turn is taken); - reads stdin",
    )
