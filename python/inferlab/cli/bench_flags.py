"""The flags of `inferlab bench` that its modes share, and lists in flags."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from inferlab.benchmarks.names import load_mode_config
from inferlab.cli import baseline, ping, specdec_flags
from inferlab.cli.flags import given_values
from inferlab.config import SpecdecConfig
from inferlab.errors import UsageError

_COUNT_FLAGS = {"--iterations": "iterations", "--warmup": "warmup_iterations"}
_HTTP_SAMPLING = {"--max-tokens": "max_tokens", "--temperature": "temperature", "--seed": "seed"}
FLAGS = {
    "local": {**baseline.FLAGS, **_COUNT_FLAGS},
    "http": {**ping.FLAGS, **_HTTP_SAMPLING, **_COUNT_FLAGS},
    "specdec": {**specdec_flags.FLAGS, **_COUNT_FLAGS},
}
"""Flag -> key of the mode's configuration."""

SWITCHES = {
    "--compare-baseline": ("specdec",),
    "--eval-perplexity": ("local", "specdec"),
    "--adaptive-K": ("specdec",),
    "--stream": ("http",),
    "--profile": ("specdec",),
}
"""Flags that are no keys, and the modes that know them."""


COMPARING = {"max_new_tokens": 128, "controller": "cost", "iterations": 3}
"""Of what compares ways to decode, where neither flag nor file says otherwise."""


def specdec_config(
    args: argparse.Namespace, defaults: Mapping[str, Any]
) -> tuple[SpecdecConfig, dict[str, str]]:
    """What flags and ``--config`` say of the engine, and the names of the flags.

    Args:
        defaults: where there is no file, and no flag says otherwise.
    """
    overrides, names = specdec_flags.given_overrides(args, FLAGS["specdec"])
    usual = {} if args.config else {k: v for k, v in defaults.items() if k not in names}
    config = load_mode_config("specdec", args.config, {**usual, **overrides}, names)
    assert isinstance(config, SpecdecConfig)
    return config, names


def refuse_misplaced(args: argparse.Namespace) -> None:
    """A flag that the mode would ignore is an error."""
    places: dict[str, list[str]] = {flag: list(modes) for flag, modes in SWITCHES.items()}
    for mode, flags in FLAGS.items():
        for flag in flags:
            places.setdefault(flag, []).append(mode)
    for flag, modes in places.items():
        given, _ = given_values(args, {flag: flag})
        if given and args.mode not in modes:
            raise UsageError(
                f"{flag}: has no meaning in --mode {args.mode}, only in {' and '.join(modes)}"
            )


def only_specdec(args: argparse.Namespace, flag: str) -> None:
    """What ``flag`` does is of ``--mode specdec``, which need not be said."""
    if args.mode not in (None, "specdec"):
        raise UsageError(f"{flag}: has no meaning in --mode {args.mode}, only in specdec")
    args.mode = "specdec"
    refuse_misplaced(args)


def name_list(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def number_list(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers: 1,4,16") from None
