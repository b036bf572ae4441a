"""Whether the default controller is ever slower than plain decoding, and what gain it leaves.

    python benchmarks/never_slower.py [--modes vanilla,ngram,eagle,medusa,recycling]
        [--batch 1,4,16,32] [--pair NAME=TARGET,DRAFT[,PROMPTS.json]] [--random-draft]
        [--fixed 2,4] [--rounds 7] [--repeats 3]

For every pair of models, drafter and batch, in turns within each round: plain decoding, the first
run of a new pipeline (what steps cost is on disk, nothing is known of acceptance), its second run,
and pipelines with fixed K. All are tokens per second over plain decoding in the same round;
medians, and of first runs the worst. In a round each runs several times on the same texts, and the
quickest counts: machines are slow for longer than a run takes. What is left of that shows where
plain decoding runs against itself: of that, too, the worst round. The bundled pair is measured
where no other is given; PROMPTS.json is a list of texts, else those held out of the bundled models'
training.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from inferlab import SpeculativePipeline, __version__
from inferlab.benchmarks.environment import describe_environment
from inferlab.models import resolve_model_path
from inferlab.training.material.corpus import heldout_prompts

HEADS = ("medusa", "eagle")  # of the bundled target
SLOWER = 0.98  # below it the promise is broken


class Pair(NamedTuple):
    name: str
    models: dict[str, Any]  # arguments of a pipeline
    prompts: list[str]

    @property
    def drafts(self) -> dict[str, Any]:
        """Arguments of a pipeline that has the target."""
        return {k: v for k, v in self.models.items() if k != "base_model"}

    def target(self) -> Any:
        base = {k: v for k, v in self.models.items() if k == "base_model"}
        return SpeculativePipeline(draft_mode="none", **base).target

    def has(self, mode: str) -> bool:
        """Whether there is such a drafter: heads belong to a target."""
        return "base_model" not in self.models or mode not in HEADS


def open_table(measured: str, heads: Sequence[str]) -> None:
    """Prints on what machine and with what it was measured, and a table's head."""
    machine = describe_environment()
    print(f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, inferlab "
          f"{__version__}; {measured}\n")  # fmt: skip
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))


def pair_of(text: str) -> Pair:
    name, _, paths = text.partition("=")
    target, draft, *prompts = paths.split(",")
    texts = json.loads(Path(prompts[0]).read_text("utf-8")) if prompts else heldout_prompts(40)
    return Pair(name, {"base_model": target, "draft_model": draft}, texts)


def with_random_draft(pair: Pair, folder: str) -> Pair:
    """The same target and a draft model of the same shape that has learnt nothing."""
    source = resolve_model_path(pair.models.get("draft_model", "inferlab/tiny-draft"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return Pair(f"{pair.name}, random draft", {**pair.models, "draft_model": folder}, pair.prompts)


class Race:
    """One drafter against plain decoding."""

    def __init__(self, pair: Pair, mode: str, batch: int, target: Any, args: Any) -> None:
        self.pair, self.batch, self.args = pair, batch, args
        self.common: dict[str, Any] = {"target": target, "max_batch": batch}
        self.drafting = {**self.common, **pair.drafts, "draft_mode": mode}
        self.plain = SpeculativePipeline(**self.common, draft_mode="none")
        self.fixed = {
            k: SpeculativePipeline(**self.drafting, k=k, controller="fixed") for k in args.fixed
        }
        self.ratios: dict[str, list[float]] = defaultdict(list)

    def run(self) -> None:
        for round_ in range(-1, self.args.rounds):
            first = (round_ + 1) * self.batch
            texts = [
                self.pair.prompts[(first + i) % len(self.pair.prompts)] for i in range(self.batch)
            ]
            speed: dict[str, float] = defaultdict(float)
            for repeat in range(self.args.repeats):
                new = SpeculativePipeline(**self.drafting)
                fresh = SpeculativePipeline(**self.common, draft_mode="none")
                runs = {
                    "plain of a new pipeline": fresh,
                    "first": new,
                    "again": new,
                    "plain": self.plain,
                    **{f"K={k}": pipeline for k, pipeline in self.fixed.items()},
                }
                order = list(runs)
                if (round_ + repeat) % 2:
                    order = ["first", "plain of a new pipeline", "plain", "again", *order[4:]]
                for name in order:
                    speed[name] = max(speed[name], self._tokens_per_second(runs[name], texts))
            if round_ < 0:
                continue
            plain = speed["plain"]
            self.ratios["first"].append(speed["first"] / speed["plain of a new pipeline"])
            self.ratios["null"].append(speed["plain of a new pipeline"] / plain)
            for name in ("again", *(f"K={k}" for k in self.fixed)):
                self.ratios[name].append(speed[name] / plain)

    def _tokens_per_second(self, pipeline: SpeculativePipeline, texts: list[str]) -> float:
        started = time.perf_counter()
        pipeline.generate(texts, self.args.max_tokens, ignore_eos=True)
        return self.args.max_tokens * len(texts) / (time.perf_counter() - started)

    def row(self) -> list[str]:
        first, again = self.ratios["first"], median(self.ratios["again"])
        fixed = {k: median(self.ratios[f"K={k}"]) for k in self.fixed}
        best = max(fixed, key=fixed.__getitem__)
        cells = [f"{median(first):.2f}", f"{min(first):.2f}", f"{again:.2f}"]
        cells += [f"{fixed[best]:.2f} (K={best})", f"{again / max(fixed[best], 1.0):.2f}"]
        cells.append(f"{min(self.ratios['null']):.2f}")
        cells.append("slower" if min(median(first), again) < SLOWER else "")
        return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--modes", default="vanilla,ngram,eagle,medusa,recycling")
    parser.add_argument("--batch", default="1,4,16,32")
    parser.add_argument("--pair", type=pair_of, action="append", help="NAME=TARGET,DRAFT[,PROMPTS]")
    parser.add_argument("--random-draft", action="store_true", help="of the first pair, too")
    parser.add_argument("--fixed", default="2,4", help="fixed K to compare with")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=3, help="of each run, in each round")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    args.fixed = [int(k) for k in args.fixed.split(",")]
    bundled = Pair("bundled", {}, heldout_prompts(40))
    pairs = args.pair or [bundled]
    heads = ["pair", "drafter", "batch", "first run", "worst", "second run", "best fixed",
             "of the best", "plain by plain", ""]  # fmt: skip
    open_table(f"{args.max_tokens} tokens, {args.rounds} rounds of {args.repeats}", heads)
    with tempfile.TemporaryDirectory() as folder:
        if args.random_draft:
            pairs = [*pairs, with_random_draft(pairs[0], folder)]
        for pair in pairs:
            target = pair.target()
            modes = args.modes.split(",")
            if pair.name.endswith("random draft"):
                modes = ["vanilla"]
            for mode in modes:
                if not pair.has(mode):
                    continue
                for batch in map(int, args.batch.split(",")):
                    race = Race(pair, mode, batch, target, args)
                    race.run()
                    print("| " + " | ".join([pair.name, mode, str(batch), *race.row()]) + " |",
                          flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
