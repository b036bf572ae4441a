"""`inferlab specdec`: speculative decoding."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from inferlab.cli.flags import add_config_argument, add_output_arguments
from inferlab.cli.profiling import add_profile_argument, check_profile, profiling
from inferlab.cli.prompts import add_prompt_arguments, gather_prompts
from inferlab.cli.results import Failed, Labels, Many, OnResult, report, run_prompts, show_result
from inferlab.cli.specdec_flags import (
    add_model_arguments,
    add_record_argument,
    add_sampling_arguments,
    add_speculation_arguments,
    check_record,
    given_overrides,
)
from inferlab.cli.terminal import (
    clean_stdout,
    setup_logging,
    show_line,
    show_piece,
    shows_live,
)
from inferlab.config import SpecdecConfig, load_config
from inferlab.output import check_output
from inferlab.specdec.results import SpecdecResult


class SpecdecOutput(SpecdecResult, Labels):
    """The JSON of one prompt."""


Output = SpecdecOutput | Many[SpecdecOutput | Failed]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab specdec``."""
    add_prompt_arguments(parser)
    add_config_argument(parser, "configs/specdec.yaml")
    add_model_arguments(parser)
    add_speculation_arguments(parser)
    add_sampling_arguments(parser)
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="prompts of --prompts decoded together (1)"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="prompts are messages of a user, put into the model's chat template",
    )
    add_record_argument(parser)
    add_profile_argument(parser, "the run, which takes longer meanwhile,")
    add_output_arguments(parser)


def read_config(args: argparse.Namespace) -> SpecdecConfig:
    """The configuration that file and flags ask for.

    Raises:
        ConfigError: a bad value; names the flag or file.
        UsageError: flags that contradict each other.
    """
    overrides, names = given_overrides(args)
    return load_config(SpecdecConfig, args.config, overrides, names=names)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab specdec``; returns the exit code."""
    config = read_config(args)
    check_output(args.output)
    check_profile(args.profile, [args.output] if args.output else [])
    prompts = gather_prompts(args)
    check_record(config)
    setup_logging(config.log_level, args.verbose or config.verbose)
    with clean_stdout(args.json) as out:
        from inferlab.specdec.pipeline import SpeculativePipeline

        pipeline = SpeculativePipeline(config=config)
        live = shows_live(args)

        def generate(texts: list[str], on_result: OnResult) -> list[SpecdecResult]:
            asked: list[Any] = list(texts)
            if args.chat:
                asked = [pipeline.chat_prompt([{"role": "user", "content": t}]) for t in texts]
            told = (lambda piece: show_piece(piece.text)) if live else None
            results: list[SpecdecResult] = pipeline.generate(
                asked, on_token=told, on_result=on_result
            )
            return results

        with profiling(pipeline.engine, args.profile):
            collected = run_prompts(prompts, generate, args, args.batch_size or 1)
        return report(collected, args, out, partial(_show, shown=live))


def _show(result: dict[str, Any], shown: bool = False) -> None:
    if not show_result(result, shown):
        return
    lossless = "lossless" if result["lossless"] else "lossy"
    drafts = f" + {result['draft_model']}" if result["draft_model"] else ""
    show_line(
        [
            f"{result['num_tokens']} tokens ({result['finish_reason']})",
            f"{result['latency_ms']:.1f} ms",
            f"{result['tokens_per_second']:.1f} tokens/s",
            f"acceptance {result['acceptance_rate']:.3f}",
            f"accepted length {result['mean_accepted_length']:.2f}",
            f"{result['target_forwards']} target forwards",
        ]
    )
    show_line(
        [
            f"{result['base_model']}{drafts}",
            f"{result['draft_mode']} drafts",
            f"{result['policy']['policy']} ({lossless})",
            f"{result['dtype']} on {result['device']}",
            "ms: " + ", ".join(f"{k} {ms:.1f}" for k, ms in result["timings_ms"].items()),
        ]
    )
    if "verdict" in result["controller"]:
        show_line([result["controller"]["verdict"]])
