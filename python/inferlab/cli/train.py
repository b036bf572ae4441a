"""`inferlab train target|draft|medusa|eagle`: trains the bundled models, or others' drafts."""

from __future__ import annotations

import argparse

from inferlab.cli.flags import add_log_arguments
from inferlab.training import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab train``."""
    add_log_arguments(parser)
    train.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab train``; returns the exit code."""
    return train.run(args)
