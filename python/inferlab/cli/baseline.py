"""`inferlab baseline`: plain decoding by Hugging Face `generate`."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from inferlab.cli.flags import (
    add_config_argument,
    add_generation_config_argument,
    add_output_arguments,
    add_safety_arguments,
    given_values,
)
from inferlab.cli.prompts import add_prompt_arguments, gather_prompts
from inferlab.cli.results import Failed, Labels, Many, OnResult, report, run_prompts, show_result
from inferlab.cli.terminal import (
    clean_stdout,
    setup_logging,
    show_line,
    show_piece,
    shows_live,
)
from inferlab.config import BaselineConfig, choices, load_config
from inferlab.output import check_output
from inferlab.records import BaselineResult


class BaselineOutput(BaselineResult, Labels):
    """The JSON of one prompt."""


Output = BaselineOutput | Many[BaselineOutput | Failed]

FLAGS = {
    "--model": "model",
    "--max-tokens": "max_new_tokens",
    "--temperature": "temperature",
    "--top-p": "top_p",
    "--top-k": "top_k",
    "--seed": "seed",
    "--device": "device",
    "--dtype": "torch_dtype",
    "--max-memory-mb": "max_memory_mb",
    "--ignore-generation-config": "ignore_generation_config",
    "--trust-remote-code": "trust_remote_code",
    "--allow-pickle": "allow_pickle",
    "--log-level": "log_level",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab baseline``."""
    add_prompt_arguments(parser)
    add_config_argument(parser, "configs/baseline.yaml")
    parser.add_argument(
        "--model", metavar="NAME", help="hub id, directory or bundled name (default: inferlab/tiny)"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="new tokens at most (48)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (0.7)")
    parser.add_argument("--top-p", type=float, help="nucleus (the model's own)")
    parser.add_argument(
        "--top-k", type=int, help="keep the k likeliest; 0 is off (the model's own)"
    )
    parser.add_argument("--seed", type=int, help="of the sampling (1234)")
    add_generation_config_argument(parser)
    parser.add_argument("--device", help="auto, cpu, mps, cuda or cuda:N (auto)")
    parser.add_argument("--dtype", choices=choices(BaselineConfig, "torch_dtype"), help="(float32)")
    add_safety_arguments(parser)
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab baseline``; returns the exit code."""
    overrides, names = given_values(args, FLAGS)
    config = load_config(BaselineConfig, args.config, overrides, names=names)
    check_output(args.output)
    prompts = gather_prompts(args)
    setup_logging(config.log_level, args.verbose)
    with clean_stdout(args.json) as out:
        from inferlab.baseline import LocalBaselineRunner

        runner = LocalBaselineRunner(config=config)
        live = shows_live(args)

        def generate(texts: list[str], _: OnResult) -> list[BaselineResult]:
            told = show_piece if live else None
            return [runner.run(text, keep_partial=True, on_text=told) for text in texts]

        collected = run_prompts(prompts, generate, args)
        return report(collected, args, out, partial(_show, shown=live))


def _show(result: dict[str, Any], shown: bool = False) -> None:
    if not show_result(result, shown):
        return
    show_line(
        [
            f"{result['model']}, {result['dtype']}, {result['device']}",
            f"{result['num_tokens']} tokens ({result['finish_reason']})",
            f"{result['latency_ms']:.1f} ms",
            f"{result['tokens_per_second']:.1f} tokens/s",
        ]
    )
