"""What a draft model says that it would have drafted is what it drafts."""

from __future__ import annotations

import pytest

from helpers.decoding import PAGES, PROMPTS, draft_of, target_of
from inferlab.specdec.acceptance import kinds_of, sure_of
from inferlab.specdec.control import Choice
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import ModelDrafter
from inferlab.specdec.drafters.examination import WINDOW
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import NO_DRAFT, Budget, TreeShape
from inferlab.types import SamplingParams

NEW_TOKENS = 30


class Late(FixedController):
    """Drafts nothing until texts are so long, then a token a step, and keeps what it hears."""

    def __init__(self, written: int, answer: bool = True) -> None:
        super().__init__(1)
        self.written, self.answer = written, answer
        self.heard: dict[int, tuple[list[float], list[bool]]] = {}
        self.sure: dict[int, list[int]] = {}

    def choose(self, outlook):
        if NEW_TOKENS - max(outlook.remaining) < self.written:
            return Choice(NO_DRAFT)
        return Choice(Budget(1, 1), judge=self)

    def examined(self, requests, sure, right) -> bool:
        self.heard |= {r: (s, w) for r, s, w in zip(requests, sure, right, strict=True) if w}
        return self.answer

    def followed(self, requests, kinds, accepted) -> None:
        return

    def goes_on(self, requests, kinds) -> bool:
        return False

    def keep(self, requests, kinds) -> list[int]:
        for request, of_nodes in zip(requests, kinds, strict=True):
            self.sure.setdefault(request, []).append(of_nodes[0])
        return [len(of_nodes) for of_nodes in kinds]


def decode(written: int, params: dict, coupled: bool = True, answer: bool = True):
    """Results, what the controller heard, and of each request whether each draft was right."""
    target, draft = target_of("llama"), draft_of("llama")
    drafter = ModelDrafter(draft, draft.new_cache(PAGES), TreeShape.chain(1), coupled=coupled)
    controller = Late(written, answer)
    engine = Engine(target, target.new_cache(PAGES), Policy(), controller, drafter)
    drafts: dict[tuple[int, int], int] = {}
    propose = drafter.propose

    def watched(batch, budget, judge=None):
        tree = propose(batch, budget, judge)
        for request, row in zip(batch.requests, tree.tokens.tolist(), strict=True):
            drafts[request.request_id, len(request.tokens)] = row[1] if len(row) > 1 else -1
        return tree

    drafter.propose = watched
    sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, seed=3, **params)
    results = engine.generate([(prompt, sampling) for prompt in PROMPTS])
    return [r.token_ids for r in results], controller, drafts


@pytest.mark.parametrize(
    "params",
    [{}, {"temperature": 0.8, "top_p": 0.9, "top_k": 40}],
    ids=["greedy", "sampled"],
)
def test_what_it_would_have_drafted_is_what_it_drafts(params):
    tokens, late, _ = decode(20, params)
    again, early, drafts = decode(1, params)
    assert tokens == again, "drafts change no token"
    checked = agreed = 0
    for number, prompt in enumerate(PROMPTS):
        text = [*prompt, *tokens[number]]
        sure, right = late.heard[number]
        assert len(sure) == len(right) == WINDOW
        for back in range(WINDOW):
            at = len(prompt) + 20 - 1 - back  # the last token is the root
            if (number, at) in drafts:
                checked += 1
                agreed += right[-1 - back]
                assert right[-1 - back] == (drafts[number, at] == text[at])
        assert set(kinds_of(sure)) & set(early.sure[number])
    assert checked > 30
    assert 0 < agreed < checked


def test_what_is_dismissed_is_not_drafted():
    tokens, controller, drafts = decode(20, {}, answer=False)
    assert tokens == decode(1, {})[0]
    first = {request: min(at for r, at in drafts if r == request) for request, _ in drafts}
    for request, at in first.items():
        assert drafts[request, at] == -1
    assert len(controller.heard) == len(PROMPTS)


def test_draws_of_its_own_and_penalties_are_not_examined():
    assert not decode(20, {"temperature": 0.8}, coupled=False)[1].heard
    assert not decode(20, {"repetition_penalty": 1.2})[1].heard


def test_how_sure_a_draft_is():
    assert sure_of(2.0, 2.0 - 1e9) == 1
    assert sure_of(1.0, 1.0) == 0.5
    assert 0.5 < sure_of(1.0, 0.5) < sure_of(1.0, 0.0) < 1
    assert sure_of(float("nan"), 0.0) == 0.5
