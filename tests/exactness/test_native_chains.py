"""Chains of a draft model in one call are those that are written level by level."""

from __future__ import annotations

import pytest
import torch

from helpers.decoding import PAGES, PROMPTS, draft_of, target_of
from inferlab.specdec.acceptance import SURE
from inferlab.specdec.control import Choice
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.costs import CostModel, DraftCosts, StepCosts
from inferlab.specdec.drafters import ModelDrafter
from inferlab.specdec.drafters.watched import Watched
from inferlab.specdec.drafters.writer import SameVocabulary
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import Budget, TreeShape
from inferlab.types import SamplingParams

LEVELS = 5
COSTS = CostModel(StepCosts((1, 64), (1.0, 1.6)), DraftCosts(((1, ((0, 0.0), (5, 0.4))),)))


class Judged(FixedController):
    """Two planners in the same state: what they are asked alike, they answer alike."""

    def __init__(self, levels: int) -> None:
        super().__init__(levels)
        self.planners = [COSTS.planner() for _ in range(2)]
        for planner in self.planners:
            rungs = [(k, k) for k in range(levels + 1)]
            planner.climb(rungs, [0.8] * levels, SURE, 50.0, True, False, False)

    def choose(self, outlook):
        size = len(outlook.requests)
        asked = (outlook.requests, 32.0, [50] * size, [0] * size, None, True, False, True, [])
        choices = [planner.choose(*asked) for planner in self.planners]
        assert choices[0] == choices[1]
        if choices[0][0] == 0:
            return Choice(Budget(self.max_k, self.max_k))
        return Choice(Budget(self.max_k, self.max_k), judge=self.planners[0])


class Compared(ModelDrafter):
    """Drafts both ways."""

    judged = 0
    compared = 0
    other = None

    def _native_chains(self, ground, shape, logits, judge, batch):
        tree = super()._native_chains(ground, shape, logits, judge, batch)
        if batch.sampling.changes_logits:
            assert tree is None
            return None
        watched = None if judge is None else Watched(self.other, batch)
        vocabulary = SameVocabulary(batch.vocab_size)
        tokens, _ = self._writer.write(ground, shape, logits, vocabulary, watched)
        counts = [shape.depth] * len(batch) if watched is None else watched.counts()
        assert [count - 1 for count in tree.node_counts] == counts
        assert torch.equal(tree.tokens, tokens[:, : 1 + max(counts)])
        self.judged += judge is not None
        self.compared += 1
        return tree


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.02},
        {"temperature": 1.3, "repetition_penalty": 1.2},
    ],
    ids=["greedy", "filtered", "penalised"],
)
@pytest.mark.parametrize("judged", [False, True], ids=["all", "judged"])
@pytest.mark.parametrize("coupled", [True, False], ids=["coupled", "independent"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_chains_in_one_call_are_those_written_level_by_level(family, coupled, judged, params):
    target, draft = target_of(family), draft_of(family)
    shape = TreeShape.chain(LEVELS)
    drafter = Compared(draft, draft.new_cache(PAGES), shape, coupled=coupled)
    controller = Judged(LEVELS) if judged else FixedController(LEVELS)
    if judged:
        drafter.other = controller.planners[1]
        drafter.known = drafter.known._replace(examines=False)  # which one of them alone hears
    engine = Engine(target, target.new_cache(PAGES), Policy(), controller, drafter, max_batch=3)
    sampling = SamplingParams(max_tokens=24, ignore_eos=True, seed=3, **params)
    results = engine.generate([(prompt, sampling) for prompt in PROMPTS])
    plain = Engine(target, target.new_cache(PAGES), Policy(), FixedController(0))
    expected = plain.generate([(prompt, sampling) for prompt in PROMPTS])
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    penalised = "repetition_penalty" in params
    assert (drafter.compared > 5) != penalised
    assert (drafter.judged > 3) == (judged and not penalised)
