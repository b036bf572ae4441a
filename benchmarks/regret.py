"""What the default controller loses against the best fixed budget of each request, in hindsight.

    python benchmarks/regret.py [--modes vanilla,ngram,medusa,eagle,recycling,self]
        [--pair NAME=TARGET,DRAFT[,PROMPTS.json]] [--prompts 20] [--max-tokens 96] [--levels 8]

Of each drafter every request is recorded with full drafts (`record=`) and decoded again on a
virtual clock, by `inferlab.specdec.replay`: with each fixed K from 0 (plain decoding) on, and by
the controller ``cost``, which goes on from request to request and knows nothing at the first. The
oracle takes the quickest K of each request. The bundled pair is measured where no other is given.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

from inferlab import SpeculativePipeline
from inferlab.specdec.costs import CostModel
from inferlab.specdec.planner import CostController
from inferlab.specdec.recorded import read_recording
from inferlab.specdec.replay import Replay
from inferlab.specdec.replay_askers import Always, Controlled
from inferlab.training.material.corpus import heldout_prompts
from never_slower import Pair, open_table, pair_of


def record(pair: Pair, mode: str, target: Any, args: argparse.Namespace, folder: str) -> list[Path]:
    """Each request with full drafts, in a folder of its own."""
    folders = [Path(folder, mode, str(n)) for n in range(args.prompts)]
    for text, place in zip(pair.prompts, folders, strict=False):
        place.mkdir(parents=True)
        pipeline = SpeculativePipeline(
            target=target,
            draft_mode=mode,
            k=args.levels,
            controller="fixed",
            record=place,
            **pair.drafts,
        )
        pipeline.generate([text], args.max_tokens, ignore_eos=True)
    return folders


def row(folders: list[Path], levels: int) -> list[str]:
    """Speed over plain decoding: of the oracle, of the best K for all, of the controller."""
    controller = CostController(levels)
    fixed: list[list[float]] = []  # ms of each request, by K
    decided: list[float] = []
    exact: list[float] = []
    for number, place in enumerate(folders):
        replay = Replay(read_recording(place))
        if not fixed:
            controller.costs = CostModel.from_json(replay.about["costs"])
        fixed.append([replay.run(Always(k)).ms for k in range(levels + 1)])
        result = replay.run(Controlled(controller, replay.about, first=number))
        decided.append(result.ms)
        exact.append(result.covered)
    regrets = [1 - min(of) / ms for of, ms in zip(fixed, decided, strict=True)]
    totals = [sum(of[k] for of in fixed) for k in range(levels + 1)]
    best = min(range(levels + 1), key=totals.__getitem__)
    plain = totals[0]
    return [
        f"{plain / sum(map(min, fixed)):.2f}",
        f"{plain / totals[best]:.2f} (K={best})",
        f"{plain / sum(decided):.2f}",
        f"{median(regrets):.1%}",
        f"{mean(regrets):.1%}",
        f"{min(of[0] / ms for of, ms in zip(fixed, decided, strict=True)):.2f}",
        f"{mean(exact):.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--modes", default="vanilla,ngram,medusa,eagle,recycling,self")
    parser.add_argument("--pair", type=pair_of, action="append", help="NAME=TARGET,DRAFT[,PROMPTS]")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--levels", type=int, default=8)
    args = parser.parse_args()
    heads = ["pair", "drafter", "oracle", "best K for all", "cost", "regret, median", "mean",
             "worst request", "exact"]  # fmt: skip
    open_table(f"{args.prompts} requests of {args.max_tokens} tokens, batch 1; speed over plain "
               "decoding, on the replay's clock", heads)  # fmt: skip
    for pair in args.pair or [Pair("bundled", {}, heldout_prompts(args.prompts))]:
        target = pair.target()
        for mode in args.modes.split(","):
            if not pair.has(mode):
                continue
            with tempfile.TemporaryDirectory() as folder:
                cells = row(record(pair, mode, target, args, folder), args.levels)
            print("| " + " | ".join([pair.name, mode, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
