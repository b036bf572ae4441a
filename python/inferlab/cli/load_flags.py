"""The flags of a load on a server, `inferlab bench --mode http`, and what they mean."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from inferlab.errors import UsageError
from inferlab.load.arrivals import Arrivals
from inferlab.load.metrics import SLOS
from inferlab.load.plan import ErrorBudget
from inferlab.load.prompt_sets import KINDS

FLAGS = (
    "--concurrency", "--rate", "--arrival", "--burstiness", "--burst", "--ramp", "--trace",
    "--conversations", "--conversations-kind", "--synthetic", "--shared-prefix", "--turns",
    "--requests", "--duration", "--sweep", "--slo", "--retries", "--error-budget", "--processes",
    "--tokenizer", "--load-seed", "--connect-timeout", "--first-token-timeout", "--stall-timeout",
    "--extra-body",
)  # fmt: skip
"""Any of them makes it a load."""

USUAL_SWEEP_PERCENT = 5.0

MOST = 10**9
"""Of whatever is counted."""
LEAST_RATE = 1e-6
"""A second, and of the shape of gaps: what comes still later does not come."""


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """The group ``load`` of ``inferlab bench``."""
    group = parser.add_argument_group(
        "load", "many requests at a time on a server (--mode http); any of these flags makes it one"
    )
    group.add_argument(
        "--concurrency", type=int, metavar="N",
        help="users, each with one conversation at a time (1); with --rate, --ramp, --burst or "
        "--trace: conversations at a time at most",
    )  # fmt: skip
    group.add_argument("--rate", type=float, metavar="R", help="conversations begun per second")
    group.add_argument(
        "--arrival", choices=("poisson", "constant"), help="of --rate: how they come (poisson)"
    )
    group.add_argument(
        "--burstiness", type=float, metavar="SHAPE",
        help="of --rate: gaps from a gamma distribution of that shape; 1 is poisson, below it "
        "they come in clusters",
    )  # fmt: skip
    group.add_argument(
        "--burst", type=int, metavar="N", help="of --rate: N at once, as often as the rate has it"
    )
    group.add_argument(
        "--ramp", metavar="A:B", help="the rate goes from A to B per second over --duration"
    )
    group.add_argument(
        "--trace", metavar="FILE",
        help="conversations with times, each begun at its own: published traces in their units, "
        "else `timestamp` of JSON lines in ms, `arrived_at` and `timestamp_s` in seconds",
    )  # fmt: skip
    group.add_argument(
        "--conversations", metavar="FILE",
        help="what is sent: JSON lines (`prompt`, `turns`, `messages`, ShareGPT) or a line of text "
        "for each; all turns, each after the answer to the one before; or --prompt, --prompts, "
        "--heldout, whose prompts are one turn each",
    )  # fmt: skip
    group.add_argument(
        "--conversations-kind", choices=KINDS,
        help="what --conversations holds, where its beginning misleads: texts that begin with a "
        "bracket are taken for JSON",
    )  # fmt: skip
    group.add_argument(
        "--synthetic", metavar="IN,OUT",
        help="texts of IN tokens by --tokenizer, answers of OUT at most; each a number, 64-256, "
        "normal:128:32, exp:128 or lognormal:128:0.8",
    )  # fmt: skip
    group.add_argument(
        "--shared-prefix", metavar="TOKENS[:GROUPS]",
        help="of --synthetic: conversations of a group (1 for all) begin with the same tokens, in "
        "front of those that --synthetic asks for",
    )  # fmt: skip
    group.add_argument("--turns", type=int, metavar="N", help="of --synthetic: turns of each (1)")
    group.add_argument(
        "--requests", type=int, metavar="N",
        help="conversations to begin, in all (each once; with --duration any number)",
    )  # fmt: skip
    group.add_argument(
        "--duration", type=float, metavar="S", help="none begins later than S seconds"
    )
    group.add_argument(
        "--sweep", type=float, nargs="?", const=USUAL_SWEEP_PERCENT, metavar="PERCENT",
        help="again with twice the --concurrency or --rate, until tokens per second grow by less "
        f"than PERCENT ({USUAL_SWEEP_PERCENT:g})",
    )  # fmt: skip
    group.add_argument(
        "--slo", action="append", metavar="NAME=MS",
        help=f"count requests that keep it as goodput; {', '.join(SLOS)}; may be given again",
    )  # fmt: skip
    group.add_argument(
        "--retries",
        type=int,
        metavar="N",
        help="further tries of a request (0); times are those of the last one",
    )
    group.add_argument(
        "--error-budget", metavar="N|P%", help="failures that leave the exit status at 0 (0)"
    )
    group.add_argument(
        "--processes", type=int, metavar="N", help="client processes that share the load (1)"
    )
    group.add_argument(
        "--tokenizer", metavar="MODEL",
        help="count the answers' tokens again by its tokenizer; writes the texts of --synthetic",
    )  # fmt: skip
    group.add_argument("--load-seed", type=int, metavar="N", help="of arrivals and texts (0)")
    for flag, text in (
        ("--connect-timeout", "for a new connection (10)"),
        ("--first-token-timeout", "until the first token (--timeout)"),
        ("--stall-timeout", "between two reads behind it (--timeout)"),
    ):
        group.add_argument(flag, type=float, metavar="S", help=f"seconds {text}")
    group.add_argument(
        "--extra-body", metavar="JSON", help='more keys of every request, {"ignore_eos": true}'
    )


def value_of(args: argparse.Namespace, flag: str) -> Any:
    """What was given by a flag; None where it was not."""
    return getattr(args, flag[2:].replace("-", "_"))


def first_load_flag(args: argparse.Namespace) -> str | None:
    """A flag that makes it a load; None where it is none."""
    return next((flag for flag in FLAGS if value_of(args, flag) is not None), None)


def check_numbers(args: argparse.Namespace) -> None:
    """Raises UsageError where a number is out of its range."""
    least = {
        "--concurrency": 1, "--burst": 1, "--turns": 1, "--requests": 1, "--processes": 1,
        "--retries": 0, "--load-seed": 0,
    }  # fmt: skip
    for flag, low in least.items():
        value = value_of(args, flag)
        if value is not None and value < low:
            raise UsageError(f"{flag}: {value} is not allowed; must be at least {low}")
        if value is not None and value > MOST and flag != "--load-seed":
            raise UsageError(f"{flag}: {value} is not allowed; must be at most {MOST}")
    for flag in (
        "--duration", "--sweep", "--connect-timeout", "--first-token-timeout", "--stall-timeout",
    ):  # fmt: skip
        value = value_of(args, flag)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{flag}: {value:g} is not allowed; must be a number above 0")
    for flag in ("--rate", "--burstiness"):
        value = value_of(args, flag)
        if value is not None and not LEAST_RATE <= value < math.inf:
            raise UsageError(
                f"{flag}: {value:g} is not allowed; must be a number from {LEAST_RATE:g} on"
            )


def check_combinations(args: argparse.Namespace) -> None:
    """Raises UsageError where a flag would change nothing beside the others."""
    needs = {
        "--arrival": ("--rate",), "--burstiness": ("--rate",), "--burst": ("--rate",),
        "--ramp": ("--duration",), "--shared-prefix": ("--synthetic",),
        "--turns": ("--synthetic",), "--synthetic": ("--tokenizer",),
        "--conversations-kind": ("--conversations",),
        "--num-prompts": ("--prompts",), "--load-seed": ("--rate", "--synthetic", "--trace"),
    }  # fmt: skip
    for flag, others in needs.items():
        if value_of(args, flag) is not None and all(value_of(args, o) is None for o in others):
            raise UsageError(f"{flag}: has a meaning with {' or '.join(others)} only; give it, too")
    for group in (
        ("--rate", "--ramp", "--trace"),
        ("--arrival", "--burstiness", "--burst"),
        ("--prompt", "--prompts", "--heldout", "--conversations", "--synthetic", "--trace"),
        ("--sweep", "--ramp", "--trace", "--burst"),
    ):
        given = [flag for flag in group if value_of(args, flag) is not None]
        if len(given) > 1:
            raise UsageError(f"{given[1]}: has no meaning with {given[0]}; give one or the other")


def arrivals_of(args: argparse.Namespace) -> Arrivals:
    """When conversations begin; a trace's times are its conversations' own.

    Raises:
        UsageError: ``--ramp`` that is none.
    """
    seed = args.load_seed or 0
    if args.ramp is not None:
        begin, _, end = args.ramp.partition(":")
        try:
            rates = float(begin), float(end)
        except ValueError:
            rates = (0.0, 0.0)
        if not all(LEAST_RATE <= rate < math.inf for rate in rates):
            raise UsageError(
                f"--ramp: {args.ramp!r} is not allowed; must be two rates, 1:20, each from "
                f"{LEAST_RATE:g} on"
            )
        return Arrivals("ramp", rate=rates[0], rate_end=rates[1], ramp_s=args.duration)
    if args.rate is None:
        return Arrivals("closed")
    if args.burst is not None:
        return Arrivals("burst", rate=args.rate, burst=args.burst)
    if args.burstiness is not None:
        return Arrivals("gamma", rate=args.rate, shape=args.burstiness, seed=seed)
    return Arrivals(args.arrival or "poisson", rate=args.rate, seed=seed)


def slos_of(args: argparse.Namespace) -> dict[str, float]:
    """``--slo``, by name."""
    slos: dict[str, float] = {}
    for text in args.slo or ():
        name, _, bound = text.partition("=")
        try:
            value = float(bound)
        except ValueError:
            value = math.nan
        if name not in SLOS or not 0 < value < math.inf:
            raise UsageError(
                f"--slo: {text!r} is not allowed; must be NAME=MS with one of {', '.join(SLOS)}"
            )
        slos[name] = value
    return slos


def budget_of(args: argparse.Namespace) -> ErrorBudget:
    """``--error-budget``."""
    text = args.error_budget or "0"
    try:
        if text.endswith("%"):
            budget = ErrorBudget(share=float(text[:-1]) / 100)
        else:
            budget = ErrorBudget(int(text))
    except ValueError:
        budget = ErrorBudget(-1)
    if budget.count < 0 or not 0 <= (budget.share or 0.0) <= 1:
        raise UsageError(
            f"--error-budget: {text!r} is not allowed; must be a number of requests or 0% to 100%"
        )
    return budget


def extra_body_of(args: argparse.Namespace) -> dict[str, Any]:
    """``--extra-body``."""
    if args.extra_body is None:
        return {}
    try:
        found = json.loads(args.extra_body)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--extra-body: is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"--extra-body: must be a JSON object, not {args.extra_body}")
    for key in found:
        if key in _SAID_ELSEWHERE:
            raise UsageError(f"--extra-body: {key!r} is for {_SAID_ELSEWHERE[key]}")
    for key in ("n", "best_of"):
        if found.get(key, 1) != 1:
            raise UsageError(
                f"--extra-body: {key} is {found[key]!r}; a request has one answer, whose times are "
                "measured: leave it out"
            )
    return found


_SAID_ELSEWHERE = {
    "model": "--model",
    "max_tokens": "--max-tokens",
    "temperature": "--temperature",
    "seed": "--seed",
    "messages": "--prompt, --conversations or --synthetic",
    "prompt": "--prompt, --conversations or --synthetic",
    "stream": "nobody to say: a load streams",
}
"""Keys of a body that the load itself sets, and what says them."""
