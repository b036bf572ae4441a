"""Whether speculation ever gives another token than plain decoding, over a whole set of prompts.

    python benchmarks/zero_divergence.py [--prompts spec_bench.jsonl] [--modes vanilla,ngram,eagle]
        [--formats none,int8] [--dtype bfloat16] [--batch 1,8] [--temperature 0,0.8]
        [--trees chain,tree] [--max-tokens 128] [--limit N] [--base-model M --draft-model D]

Every combination decodes all prompts, with K = 4 in chains and [3, 2, 1, 1] in trees; plain
decoding decodes each of them once, alone. What is counted: prompts whose tokens differ anywhere.
PROMPTS is a JSON-lines file with `prompt` or `turns`, of which the first counts; else those held
out of the bundled models' training. Prompts keep their last tokens where the model's context is too
short for all.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any

from inferlab import SpeculativePipeline, __version__
from inferlab.benchmarks.environment import describe_environment
from inferlab.prompts import read_prompts
from inferlab.training.material.corpus import heldout_prompts

TREE = [3, 2, 1, 1]


def names(text: str) -> list[str]:
    return text.split(",")


def texts_of(args: Any, pipeline: SpeculativePipeline) -> list[str]:
    if args.prompts is None:
        return heldout_prompts(args.limit or 24)
    texts = [prompt.text for prompt in read_prompts(args.prompts)][: args.limit]
    limit = pipeline.target.context_length
    tokenizer = pipeline.target.tokenizer
    if limit is None or tokenizer is None:
        return texts
    room = limit - args.max_tokens - 64  # cut texts may take some more tokens than were kept
    cut = []
    for text in texts:
        ids = tokenizer.encode(text)
        cut.append(text if len(ids) <= room else tokenizer.decode(ids[-room:]))
    return cut


def differing(
    pipeline: SpeculativePipeline,
    texts: list[str],
    expected: list[list[int]],
    batch: int,
    asked: dict[str, Any],
) -> tuple[int, int, float]:
    """Prompts whose tokens differ, draft tokens accepted, and seconds."""
    wrong = accepted = 0
    started = time.perf_counter()
    for first in range(0, len(texts), batch):
        group = texts[first : first + batch]
        results = pipeline.generate(group, **asked)
        for result, tokens in zip(results, expected[first : first + batch], strict=True):
            wrong += result["token_ids"] != tokens
            accepted += result["accepted"]
    return wrong, accepted, time.perf_counter() - started


def run(args: Any) -> int:
    """Prints a row for each combination; returns how many texts differed in all."""
    machine = describe_environment()
    print(f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, inferlab "
          f"{__version__}; {args.dtype}, {args.max_tokens} tokens\n")  # fmt: skip
    print("| weights | drafter | drafts | batch | temperature | prompts | tokens | differ |"
          " accepted | s |\n|" + "---|" * 10)  # fmt: skip
    total = 0
    models = {"base_model": args.base_model, "draft_model": args.draft_model}
    for format_ in args.formats:
        plain = SpeculativePipeline(
            draft_mode="none", dtype=args.dtype, quantization=format_, max_batch=1,
            base_model=args.base_model,
        )  # fmt: skip
        texts = texts_of(args, plain)
        for temperature in args.temperature:
            asked = {"max_tokens": args.max_tokens, "temperature": temperature, "seed": 7}
            expected = [r["token_ids"] for r in plain.generate(texts, **asked)]
            tokens = sum(map(len, expected))
            for mode, tree, batch in itertools.product(args.modes, args.trees, args.batch):
                pipeline = SpeculativePipeline(
                    **models, draft_mode=mode, dtype=args.dtype, quantization=format_,
                    target=plain.target, max_batch=batch, controller="fixed",
                    **({"k": 4} if tree == "chain" else {"tree": TREE}),
                )  # fmt: skip
                wrong, accepted, spent = differing(pipeline, texts, expected, batch, asked)
                total += wrong
                print(f"| {format_} | {mode} | {tree} | {batch} | {temperature} | {len(texts)} | "
                      f"{tokens} | {wrong} | {accepted / tokens:.2f} | {spent:.0f} |",
                      flush=True)  # fmt: skip
    print(f"\n{total} texts differ")
    return total


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", metavar="FILE.jsonl")
    parser.add_argument("--limit", type=int, help="prompts at most")
    parser.add_argument("--base-model")
    parser.add_argument("--draft-model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--modes", type=names, default=["vanilla", "ngram", "eagle"])
    parser.add_argument("--formats", type=names, default=["none", "int8"])
    parser.add_argument("--trees", type=names, default=["chain", "tree"])
    parser.add_argument(
        "--batch", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8]
    )
    parser.add_argument(
        "--temperature", type=lambda text: [float(n) for n in text.split(",")], default=[0.0, 0.8]
    )
    parser.add_argument("--max-tokens", type=int, default=128)
    return 1 if run(parser.parse_args(words)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
