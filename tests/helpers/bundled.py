"""Decoding with the bundled target: prompts, and the tokens without a draft."""

from __future__ import annotations

from functools import cache

from inferlab import SpeculativePipeline

PROMPTS = [
    "class Stack:\n    def __init__(self):\n",
    "import os\n",
    "def main(argv=None):\n    parser = argparse.ArgumentParser()\n    parser.add_argument(",
    "#",
    'raise ValueError("',
]
NEW_TOKENS = 48
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "seed": 11}


@cache
def plain(dtype: str) -> SpeculativePipeline:
    return SpeculativePipeline(draft_mode="none", dtype=dtype, max_batch=1)


@cache
def plain_tokens(dtype: str, sampled: bool) -> list[list[int]]:
    sampling = SAMPLED if sampled else GREEDY
    return [
        plain(dtype).generate(p, max_tokens=NEW_TOKENS, **sampling)["token_ids"] for p in PROMPTS
    ]
