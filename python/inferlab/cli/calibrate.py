"""`inferlab calibrate`: measures which draft tokens are accepted, for `--tree optimal`, or what
steps cost."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from inferlab.cli import specdec_flags
from inferlab.cli.flags import add_config_argument, add_log_arguments
from inferlab.cli.parser import EXIT_OK
from inferlab.cli.terminal import setup_logging
from inferlab.config import SpecdecConfig, load_config
from inferlab.errors import UsageError
from inferlab.prompts import read_prompts
from inferlab.specdec.calibration import write_acceptance
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.training.material.corpus import Corpus, training_prompts
from inferlab.training.measure.rates import acceptance_rates

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab calibrate``."""
    parser.add_argument(
        "--prompts", metavar="FILE.jsonl", help="(files of the standard library, not held out)"
    )
    parser.add_argument("--num-prompts", type=int, default=60, metavar="N", help="(60)")
    parser.add_argument(
        "--output", metavar="DIR", help="folder of the draft's weights; needed without --costs"
    )
    parser.add_argument(
        "--costs",
        action="store_true",
        help="measure what steps cost instead, and print how well it is predicted",
    )
    add_log_arguments(parser)
    add_config_argument(parser, "configs/specdec.yaml")
    specdec_flags.add_model_arguments(parser)
    specdec_flags.add_speculation_arguments(parser)
    specdec_flags.add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab calibrate``; returns the exit code."""
    if args.costs:
        _check_for_costs(args)
    else:
        _check_for_acceptance(args)
    overrides, names = specdec_flags.given_overrides(args)
    config = load_config(SpecdecConfig, args.config, overrides, names=names)
    return _run_costs(args, config) if args.costs else _run_acceptance(args, config)


def _check_for_acceptance(args: argparse.Namespace) -> None:
    if args.output is None:
        raise UsageError("--output: missing; name the folder of the draft's weights, or --costs")
    for flag in MEANINGLESS:
        if getattr(args, flag[2:].replace("-", "_")):
            raise UsageError(
                f"{flag}: has no meaning here; every step drafts the largest tree of --K levels"
            )


def _check_for_costs(args: argparse.Namespace) -> None:
    for flag in ("--output", "--prompts"):
        if getattr(args, flag[2:]) is not None:
            raise UsageError(f"{flag}: has no meaning beside --costs, which measures times only")


def _run_acceptance(args: argparse.Namespace, config: SpecdecConfig) -> int:
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
    rates = acceptance_rates(config, prompts)
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


def _run_costs(args: argparse.Namespace, config: SpecdecConfig) -> int:
    setup_logging(config.log_level, args.verbose)
    pipeline = SpeculativePipeline(config=config)
    costs = pipeline.costs(anew=True)
    if costs is None:
        raise UsageError(
            f"--costs: the context of {pipeline.target.name} or its K/V cache has no room for the "
            "texts that are measured; take a model with a longer one, or raise num_pages or "
            "kv_memory_mb"
        )
    checked = pipeline.check_costs(costs)
    if not checked:
        raise UsageError(
            f"--costs: the context of {pipeline.target.name} or its K/V cache has no room for the "
            "texts that costs are checked with"
        )
    print("batch nodes context  measured predicted    off")
    for step, predicted in checked:
        print(
            f"{step.batch:5} {step.nodes:5} {step.context:7} {step.ms:6.2f} ms {predicted:6.2f} ms "
            f"{predicted / step.ms - 1:+6.0%}"
        )
    off = sorted(abs(predicted / step.ms - 1) for step, predicted in checked)
    high = off[int(0.9 * len(off))]
    print(f"off by {median(off):.0%} in the median, {high:.0%} at the 90th percentile")
    for batch, row in costs.draft.table:
        print(f"drafting for {batch}: " + ", ".join(f"{n} nodes {ms:.2f} ms" for n, ms in row))
    return EXIT_OK
