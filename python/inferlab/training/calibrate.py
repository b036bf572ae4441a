"""`inferlab calibrate`: measures which draft tokens are accepted, for `--tree optimal`.

Decodes prompts with a tree as large as trees get and counts, by depth, how often the r-th best
draft token was the one that the target chose. The rates go into `acceptance.json` beside the
draft's weights, where optimal trees find them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from inferlab.cli_common import (
    EXIT_OK,
    UsageError,
    add_config_argument,
    read_prompts,
    setup_logging,
)
from inferlab.config import MAX_TREE_NODES, SpecdecConfig, load_config
from inferlab.specdec import run_specdec
from inferlab.specdec.calibration import AcceptanceCounts, write_acceptance
from inferlab.specdec.controllers import FixedController, StepObservation
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.specdec.tree import ASSUMED_ACCEPTANCE, TreeShape
from inferlab.training.material.corpus import Corpus, training_prompts

MODES = ("vanilla", "medusa", "eagle")
"""Draft modes whose static trees take a node's r-th best token, with weights of their own."""

MEANINGLESS = (
    "--tree",
    "--tree-nodes",
    "--tree-width",
    "--controller",
    "--adaptive-K",
    "--min-k",
    "--max-k",
    "--target-acceptance",
)
"""Flags of `inferlab specdec` that say how much to draft."""


class CountingController(FixedController):
    """Drafts all of a tree in every step and counts which of its nodes are accepted."""

    def __init__(self, shape: TreeShape) -> None:
        super().__init__(shape.depth)
        self.counts = AcceptanceCounts(shape)
        self._shape = shape

    def observe(self, step: StepObservation) -> None:
        if step.budget.levels < self._shape.depth:
            return  # near the end of a text less is drafted
        for ranks, depth in zip(step.accepted, step.depths, strict=True):
            if depth == self._shape.depth:
                self.counts.add(ranks)


def calibrate(config: SpecdecConfig, prompts: list[str]) -> list[list[float]]:
    """Acceptance by depth and rank of the drafter that ``config`` names, on these prompts.

    Raises:
        ValueError: a draft mode whose trees are not made from it.
    """
    if config.draft_mode not in MODES:
        raise ValueError(
            f"draft_mode is {config.draft_mode!r}; only the trees of {', '.join(MODES)} are made "
            "from measured acceptance"
        )
    shape = TreeShape.best([list(ASSUMED_ACCEPTANCE)], MAX_TREE_NODES - 1, config.levels)
    controller = CountingController(shape)
    SpeculativePipeline(
        config=config.model_copy(update={"tree": None}), controller=controller, shape=shape
    ).generate(prompts)
    return controller.counts.rates()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab calibrate``."""
    parser.add_argument(
        "--prompts", metavar="FILE.jsonl", help="(files of the standard library, not held out)"
    )
    parser.add_argument("--num-prompts", type=int, default=60, metavar="N", help="(60)")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="folder of the draft's weights"
    )
    parser.add_argument("--verbose", action="store_true", help="log everything")
    add_config_argument(parser, "configs/specdec.yaml")
    run_specdec.add_model_arguments(parser)
    run_specdec.add_speculation_arguments(parser)
    run_specdec.add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab calibrate``; returns the exit code."""
    for flag in MEANINGLESS:
        if getattr(args, flag[2:].replace("-", "_")):
            raise UsageError(
                f"{flag}: has no meaning here; every step drafts the largest tree of --K levels"
            )
    overrides, names = run_specdec.given_overrides(args)
    config = load_config(SpecdecConfig, args.config, overrides, names=names)
    folder = Path(args.output)
    if not folder.is_dir():
        raise UsageError(f"--output: {folder} is no folder; name the one that holds the weights")
    if args.num_prompts < 1:
        raise UsageError(f"--num-prompts: {args.num_prompts} is not allowed; must be at least 1")
    if args.prompts is not None:
        given = read_prompts(args.prompts)[: args.num_prompts]
        for prompt in given:
            try:
                prompt.check()
            except ValueError as error:
                raise UsageError(f"{prompt.where}: {error}") from None
        prompts = [prompt.text for prompt in given]
    else:
        prompts = training_prompts(Corpus.of(), args.num_prompts)
    setup_logging(config.log_level, args.verbose)
    rates = calibrate(config, prompts)
    if not rates:
        raise UsageError(
            f"--num-prompts: {len(prompts)} prompts of {config.max_new_tokens} tokens were too few "
            "to measure any rate; give more, or more --max-tokens"
        )
    about: dict[str, Any] = {
        "base_model": config.base_model,
        "draft_mode": config.draft_mode,
        "temperature": config.effective_temperature,
        "prompts": len(prompts),
        "new_tokens": config.max_new_tokens,
    }
    write_acceptance(folder, rates, about)
    for depth, row in enumerate(rates, start=1):
        print(f"level {depth}: " + " ".join(f"{rate:.3f}" for rate in row))
    return EXIT_OK
