"""`inferlab calibrate`: measures which draft tokens are accepted, for `--tree optimal`, whether as
many are as predicted, or what steps cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from typing_extensions import TypedDict

from inferlab.cli import specdec_flags
from inferlab.cli.flags import add_config_argument, add_log_arguments
from inferlab.cli.parser import EXIT_OK
from inferlab.cli.terminal import clean_stdout, setup_logging
from inferlab.config import SpecdecConfig, load_config
from inferlab.draft_modes import DRAFT_MODES
from inferlab.errors import UsageError
from inferlab.output import print_json
from inferlab.plots import check_plot
from inferlab.prompts import read_prompts
from inferlab.specdec.calibration import write_acceptance
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.training.material.corpus import Corpus, heldout_prompts, training_prompts
from inferlab.training.measure.rates import acceptance_rates
from inferlab.training.measure.reliability import draw_reliability, reliability

TREES = ("--tree", "--tree-nodes", "--tree-width")
CONTROLLERS = ("--controller", "--adaptive-K", "--min-k", "--max-k", "--target-acceptance")
"""Flags of `inferlab specdec` that say how much to draft."""
NUM_PROMPTS = 60


class RatesOutput(TypedDict):
    """What is written beside the weights: ``rates`` by level, of each rank."""

    rates: list[list[float]]
    about: dict[str, Any]


class BinRow(TypedDict):
    """Nodes whose predicted chances are in [low, high): their mean chance, and the share that was
    accepted."""

    low: float
    high: float
    nodes: int
    predicted: float
    accepted: float


class ReliabilityOutput(TypedDict):
    """``--reliability``; ``error``: the expected calibration error, ``likely_error``: of the nodes
    whose chance was 0.1 or more."""

    draft_mode: str
    prompts: int
    max_new_tokens: int
    temperature: float
    heldout: bool
    bins: list[BinRow]
    nodes: int
    error: float
    likely_nodes: int
    likely_error: float


class StepRow(TypedDict):
    """A step: ``nodes`` of each sequence, the root included, behind ``context`` tokens."""

    batch: int
    nodes: int
    context: int
    ms: float
    predicted_ms: float


class CostsOutput(TypedDict):
    """``--costs``: the model, and steps that it was checked with; how far it was off, relative to
    what was measured."""

    costs: dict[str, Any]
    steps: list[StepRow]
    off_median: float
    off_p90: float


Output = RatesOutput | ReliabilityOutput | CostsOutput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab calibrate``."""
    parser.add_argument(
        "--prompts",
        metavar="FILE.jsonl",
        help="(files of the standard library; held-out ones with --reliability)",
    )
    parser.add_argument("--num-prompts", type=int, metavar="N", help=f"({NUM_PROMPTS})")
    parser.add_argument(
        "--output", metavar="DIR", help="folder of the draft's weights, which the rates go to"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--reliability",
        action="store_true",
        help="print instead how often draft nodes are accepted, by the chance that was predicted",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw what --reliability prints")
    what.add_argument(
        "--costs",
        action="store_true",
        help="measure what steps cost instead, and print how well it is predicted",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON on stdout")
    add_log_arguments(parser)
    add_config_argument(parser, "configs/specdec.yaml")
    specdec_flags.add_model_arguments(parser)
    specdec_flags.add_speculation_arguments(parser)
    specdec_flags.add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab calibrate``; returns the exit code."""
    _check(args)
    overrides, names = specdec_flags.given_overrides(args)
    config = load_config(SpecdecConfig, args.config, overrides, names=names)
    setup_logging(config.log_level, args.verbose)
    with clean_stdout(args.json) as out:
        tell = partial(print_json, out=out) if args.json else None
        if args.costs:
            (tell or _show_costs)(_measure_costs(config))
        elif args.reliability:
            (tell or _show_reliability)(_measure_reliability(args, config))
        else:
            (tell or _show_rates)(_measure_rates(args, config))
    return EXIT_OK


def _check(args: argparse.Namespace) -> None:
    """Refuses flags that mean nothing for what is asked."""
    if args.costs:
        texts = ("--output", "--prompts", "--num-prompts")
        _refuse(args, texts, "beside --costs, which measures times only")
    elif args.reliability:
        _refuse(args, ("--output",), "beside --reliability, which keeps nothing; see --plot")
        _refuse(args, CONTROLLERS, "here; every step drafts the largest tree of --K levels")
    elif args.output is None:
        raise UsageError(
            "--output: missing; name the folder of the draft's weights, or --reliability or --costs"
        )
    else:
        flags = (*TREES, *CONTROLLERS)
        _refuse(args, flags, "here; every step drafts the largest tree of --K levels")
    if args.plot is not None:
        if not args.reliability:
            raise UsageError("--plot: has no meaning without --reliability, which it draws")
        check_plot(args.plot, "--plot")


def _refuse(args: argparse.Namespace, flags: Sequence[str], why: str) -> None:
    for flag in flags:
        if getattr(args, flag[2:].replace("-", "_")) not in (None, False):
            raise UsageError(f"{flag}: has no meaning {why}")


def _prompts(args: argparse.Namespace) -> list[str]:
    """Those of ``--prompts``, else bundled ones."""
    count = NUM_PROMPTS if args.num_prompts is None else args.num_prompts
    if count < 1:
        raise UsageError(f"--num-prompts: {count} is not allowed; must be at least 1")
    if args.prompts is None:
        return heldout_prompts(count) if args.reliability else training_prompts(Corpus.of(), count)
    given = read_prompts(args.prompts)[:count]
    for prompt in given:
        try:
            prompt.check()
        except ValueError as error:
            raise UsageError(f"{prompt.where}: {error}") from None
    return [prompt.text for prompt in given]


def _measure_rates(args: argparse.Namespace, config: SpecdecConfig) -> RatesOutput:
    folder = Path(args.output)
    if not folder.is_dir():
        raise UsageError(f"--output: {folder} is no folder; name the one that holds the weights")
    _check_drafts(config)
    prompts = _prompts(args)
    rates = acceptance_rates(config, prompts)
    if not rates:
        raise _too_few(config, prompts)
    about: dict[str, Any] = {
        "base_model": config.base_model,
        "draft_mode": config.draft_mode,
        "temperature": config.effective_temperature,
        "prompts": len(prompts),
        "new_tokens": config.max_new_tokens,
    }
    write_acceptance(folder, rates, about)
    return {"rates": [list(row) for row in rates], "about": about}


def _show_rates(found: RatesOutput) -> None:
    for depth, row in enumerate(found["rates"], start=1):
        print(f"level {depth}: " + " ".join(f"{rate:.3f}" for rate in row))


def _check_drafts(config: SpecdecConfig) -> None:
    if not DRAFT_MODES[config.draft_mode].plan:
        raise UsageError(f"--draft-mode: {config.draft_mode!r} drafts nothing that may be accepted")
    if config.levels < 1:
        raise UsageError("--K: 0 drafts nothing that may be accepted; must be at least 1")


def _too_few(config: SpecdecConfig, prompts: Sequence[str]) -> UsageError:
    return UsageError(
        f"--num-prompts: {len(prompts)} prompts of {config.max_new_tokens} tokens were too few "
        "to measure any rate; give more, or more --max-tokens"
    )


def _measure_reliability(args: argparse.Namespace, config: SpecdecConfig) -> ReliabilityOutput:
    _check_drafts(config)
    prompts = _prompts(args)
    found = reliability(config, prompts)
    if not found.nodes:
        raise _too_few(config, prompts)
    if args.plot is not None:
        draw_reliability(Path(args.plot), found, title=config.draft_mode)
    return {
        "draft_mode": config.draft_mode,
        "prompts": len(prompts),
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.effective_temperature,
        "heldout": args.prompts is None,
        "bins": [
            {
                "low": row.low,
                "high": row.high,
                "nodes": row.nodes,
                "predicted": row.predicted,
                "accepted": row.accepted,
            }
            for row in found.bins
        ],
        "nodes": found.nodes,
        "error": found.error(),
        "likely_nodes": sum(row.nodes for row in found.bins[1:]),
        "likely_error": found.error(0.1),
    }


def _show_reliability(found: ReliabilityOutput) -> None:
    texts = "held-out prompts" if found["heldout"] else "prompts"
    print(
        f"{found['draft_mode']}: {found['prompts']} {texts} of {found['max_new_tokens']} tokens, "
        f"temperature {found['temperature']:g}"
    )
    print("chance      nodes  predicted  accepted    off")
    for b in found["bins"]:
        row = f"{b['low']:.1f} - {b['high']:.1f} {b['nodes']:7}"
        if b["nodes"]:
            off = b["accepted"] - b["predicted"]
            row += f"  {b['predicted']:9.3f} {b['accepted']:9.3f} {off:+6.3f}"
        print(row)
    print(
        f"expected calibration error: {found['error']:.3f} over {found['nodes']} nodes, "
        f"{found['likely_error']:.3f} over the {found['likely_nodes']} whose chance was 0.1 or more"
    )


def _measure_costs(config: SpecdecConfig) -> CostsOutput:
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
    off = sorted(abs(predicted / step.ms - 1) for step, predicted in checked)
    return {
        "costs": json.loads(costs.to_json()),
        "steps": [
            {
                "batch": step.batch,
                "nodes": step.nodes,
                "context": step.context,
                "ms": step.ms,
                "predicted_ms": predicted,
            }
            for step, predicted in checked
        ],
        "off_median": median(off),
        "off_p90": off[int(0.9 * len(off))],
    }


def _show_costs(found: CostsOutput) -> None:
    print("batch nodes context  measured predicted    off")
    for step in found["steps"]:
        ms, predicted = step["ms"], step["predicted_ms"]
        print(
            f"{step['batch']:5} {step['nodes']:5} {step['context']:7} {ms:6.2f} ms "
            f"{predicted:6.2f} ms {predicted / ms - 1:+6.0%}"
        )
    median_, high = found["off_median"], found["off_p90"]
    print(f"off by {median_:.0%} in the median, {high:.0%} at the 90th percentile")
    for batch, row in found["costs"]["draft"]["table"]:
        print(f"drafting for {batch}: " + ", ".join(f"{n} nodes {ms:.2f} ms" for n, ms in row))
