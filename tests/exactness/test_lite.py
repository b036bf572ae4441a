"""The untrained imitations of Medusa and EAGLE: what they draft, and that no token changes."""

from __future__ import annotations

import pytest
import torch

from helpers.compare import assert_same_tokens
from helpers.decoding import GREEDY, PAGES, PROMPTS, SAMPLED, Sleepy, plain_tokens, target_of
from helpers.pairwise import pairwise
from inferlab.models import FakeLM
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import Drafter, EagleLiteDrafter, MedusaLiteDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.types import SamplingParams

KINDS = ("medusa-tie", "medusa-copy", "medusa-random", "eagle")


def drafter_of(kind: str, family: str) -> Drafter:
    target = target_of(family)
    if kind == "eagle":
        return EagleLiteDrafter(target, alpha=0.7, max_draft=3)
    return MedusaLiteDrafter(target, 3, kind.removeprefix("medusa-"), 0.7, 0.9)


def engine(drafter: Drafter, family: str, max_batch: int, controller=None) -> Engine:
    target = target_of(family)
    controller = controller or FixedController(4)
    return Engine(target, target.new_cache(PAGES), Policy(), controller, drafter, max_batch)


@pairwise(
    family=["gpt2", "llama", "gemma2"],
    kind=KINDS,
    sleepy={"each step": False, "some steps": True},
    params={"greedy": GREEDY, "sampled": SAMPLED},
)
def test_no_token_changes(family, kind, sleepy, params):
    target = target_of(family)
    for max_batch in (1, 4):
        controller = Sleepy(3) if sleepy else None
        decoding = engine(drafter_of(kind, family), family, max_batch, controller)
        # Different lengths: sequences leave and others join.
        lengths = [24, 7, 15, 24, 11]
        requests = [
            (prompt, SamplingParams(**{**vars(params), "max_tokens": length}))
            for prompt, length in zip(PROMPTS, lengths, strict=True)
        ]
        expected = plain_tokens(family, params)
        results = decoding.generate(requests)
        for prompt, tokens, length, result in zip(PROMPTS, expected, lengths, results, strict=True):
            what = f"{family}, {kind}, batch {max_batch}"
            assert_same_tokens(target, prompt, tokens[:length], result.token_ids, params, what)
        assert sum(r.stats.proposed for r in results) > 0
        assert not decoding.drafter._features._loose


def hidden_states(family: str, tokens: list[int]) -> torch.Tensor:
    """What the output head sees at each token, [N, H], by the model's own attention."""
    seen = []
    with target_of(family).plain() as model, torch.inference_mode():
        head = model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(torch.tensor([tokens]), use_cache=False)
        handle.remove()
    return seen[0][0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["medusa-tie", "medusa-copy", "eagle"])
def test_they_draft_what_they_say(family, kind):
    """Greedily: from the states of all tokens but the root."""
    drafter = drafter_of(kind, family)
    head = target_of(family).model.get_output_embeddings()
    propose, checked = drafter.propose, []

    def watched(batch, budget, judge=None):
        tree = propose(batch, budget)
        for row, sequence in enumerate(batch.requests):
            if len(sequence.tokens) < 3:  # one state only: no line through it
                continue
            states = hidden_states(family, sequence.tokens[:-1])
            before, newest = states[-2], states[-1]
            for depth in range(1, tree.num_nodes):
                if kind == "eagle":
                    before, newest = newest, newest + 0.7 * (newest - before)
                with torch.inference_mode():
                    logits = head(newest)
                best = logits.topk(2)
                if best.values[0] - best.values[1] > 1e-3:
                    assert tree.tokens[row, depth] == best.indices[0]
                    checked.append(depth)
        return tree

    drafter.propose = watched
    engine(drafter, family, 4, Sleepy(3)).generate([(p, GREEDY) for p in PROMPTS])
    assert checked.count(3) > 20


def test_a_copied_head_says_the_same_and_a_random_one_is_its_seeds():
    tie, copied = (drafter_of(f"medusa-{init}", "llama") for init in ("tie", "copy"))
    assert torch.equal(tie.heads[2].weight, copied.heads[2].weight)
    assert tie.heads[2].weight is tie.head.weight
    assert copied.heads[2].weight is not tie.head.weight
    target = target_of("llama")
    first, again, other = (MedusaLiteDrafter(target, 2, "random", seed=s) for s in (1, 1, 2))
    assert torch.equal(first.heads[1].weight, again.heads[1].weight)
    assert not torch.equal(first.heads[1].weight, other.heads[1].weight)
    assert not torch.equal(first.heads[0].weight, first.heads[1].weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: MedusaLiteDrafter(t, 0), "num_heads is 0"),
        (lambda t: MedusaLiteDrafter(t, head_init="zero"), "head_init is 'zero'"),
        (lambda t: MedusaLiteDrafter(t, temperature=-1.0), "temperature is -1"),
        (lambda t: MedusaLiteDrafter(t, top_p=0.0), "top_p is 0"),
        (lambda t: EagleLiteDrafter(t, alpha=1.5), "alpha is 1.5"),
        (lambda t: EagleLiteDrafter(t, max_draft=0), "max_draft is 0"),
        (lambda t: EagleLiteDrafter(FakeLM()), "fake has no hidden states"),
        (lambda t: MedusaLiteDrafter(FakeLM()), "fake has no hidden states"),
    ],
)
def test_wrong_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(target_of("llama"))
