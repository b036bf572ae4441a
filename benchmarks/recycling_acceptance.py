"""How often the target's choice is a token's r-th successor in the recycling drafter's table.

    python benchmarks/recycling_acceptance.py

prints the list that `inferlab.specdec.drafters.recycling.ACCEPTANCE` keeps: the bundled target at
temperature 0, over held-out prompts, after others that fill the table.
"""

from __future__ import annotations

from typing import Any

from inferlab import SamplingParams, SpeculativePipeline
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import RecyclingDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import Budget, DraftTree
from inferlab.specdec.walk import Walk
from inferlab.training.material.corpus import heldout_prompts

NEW_TOKENS = 128
# The first 20 are those of `inferlab bench --heldout 20`: left out.
MEASURED, FILLING = slice(20, 40), slice(40, 60)


class Watched(RecyclingDrafter):
    """Counts the rank of every token that the target chose, in the table as it was before."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.counts = [0] * self.successors
        self.total = 0

    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        self._before = self.table.clone()
        return super().propose(batch, budget, judge)

    def commit(self, batch: Batch, walk: Walk) -> None:
        chosen = zip(walk.nodes.tolist(), walk.tokens.tolist(), walk.kept.tolist(), strict=True)
        for row, (nodes, tokens, kept) in enumerate(chosen):
            for node, token in zip(nodes[:kept], tokens[:kept], strict=True):
                known = self._before[int(walk.tree.tokens[row, node])].tolist()
                self.total += 1
                if token in known:
                    self.counts[known.index(token)] += 1
        super().commit(batch, walk)


def main() -> None:
    pipeline = SpeculativePipeline(draft_mode="none")
    target = pipeline.target
    drafter = Watched(target.vocab_size, target.device)
    engine = Engine(target, target.new_cache(256), Policy(), FixedController(64), drafter, 1)
    prompts = [target.tokenizer.encode(text) for text in heldout_prompts(FILLING.stop)]
    params = SamplingParams(max_tokens=NEW_TOKENS)
    engine.generate([(prompt, params) for prompt in prompts[FILLING]])
    drafter.counts, drafter.total = [0] * drafter.successors, 0
    results = engine.generate([(prompt, params) for prompt in prompts[MEASURED]])
    emitted = sum(r.stats.emitted for r in results)
    steps = sum(r.stats.steps for r in results)
    print("by rank:", tuple(round(count / drafter.total, 4) for count in drafter.counts))
    print(f"accepted length with the present tree: {emitted / steps:.3f}")


if __name__ == "__main__":
    main()
