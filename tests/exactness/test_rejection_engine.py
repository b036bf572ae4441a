"""The `rejection` policy through the whole engine: the distribution is the target's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from inferlab.models import FakeLM, ForwardBatch
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import ModelDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import TreeShape
from inferlab.types import SamplingParams

VOCAB = 5
PROMPT = [1, 3, 2]
TEMPERATURE = 1.3
DRAWS = 6000


def next_probabilities(model: FakeLM, tokens: list[int]) -> np.ndarray:
    """The model's distribution after ``tokens``, [V]."""
    cache = model.new_cache(4)
    logits = model.forward(
        ForwardBatch(
            tokens=torch.tensor([tokens]),
            positions=torch.arange(len(tokens))[None],
            seq_lens=torch.zeros(1, dtype=torch.int32),
            block_table=torch.arange(4, dtype=torch.int32)[None],
            last_only=True,
        ),
        cache,
    )[0, 0].double()
    return torch.softmax(logits / TEMPERATURE, dim=-1).numpy()


def expected_triples(model: FakeLM) -> np.ndarray:
    """P(first, second, third new token), [V, V, V]."""
    table = np.zeros((VOCAB,) * 3)
    first = next_probabilities(model, PROMPT)
    for a in range(VOCAB):
        second = next_probabilities(model, [*PROMPT, a])
        for b in range(VOCAB):
            third = next_probabilities(model, [*PROMPT, a, b])
            table[a, b] = first[a] * second[b] * third
    return table


def p_value(engine: Engine, expected: np.ndarray) -> float:
    requests = [
        (PROMPT, SamplingParams(max_tokens=3, temperature=TEMPERATURE, seed=seed))
        for seed in range(DRAWS)
    ]
    counts = np.zeros(expected.shape)
    for result in engine.generate(requests):
        counts[tuple(result.token_ids)] += 1
    means = expected * DRAWS
    # Rare cells are added up, so that each counted cell expects at least five.
    rare = means < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    mean = np.append(means[~rare], means[rare].sum())
    statistic = ((observed - mean) ** 2 / np.maximum(mean, 1e-9))[mean > 0].sum()
    return float(chi2.sf(statistic, (mean > 0).sum() - 1))


def rejection_engine(drafter_class: type[ModelDrafter], widths: tuple[int, ...]) -> Engine:
    target = FakeLM(VOCAB, seed=2)
    draft = FakeLM(VOCAB, seed=2, agreement=0.4)
    drafter = drafter_class(
        draft,
        draft.new_cache(512, 8),
        TreeShape.regular(widths),
        coupled=False,
        keep_logits=True,
    )
    policy, controller = Policy("rejection"), FixedController(len(widths))
    return Engine(target, target.new_cache(512, 8), policy, controller, drafter, max_batch=128)


@pytest.mark.parametrize("widths", [(1, 1), (3, 2)], ids=["chain", "tree"])
def test_the_distribution_is_the_targets(widths):
    expected = expected_triples(FakeLM(VOCAB, seed=2))
    assert p_value(rejection_engine(ModelDrafter, widths), expected) > 1e-3


class Misaligned(ModelDrafter):
    """Hands on each level's logits one node late."""

    def propose(self, batch, budget):
        tree = super().propose(batch, budget)
        if tree.draft_logits is not None:
            tree.draft_logits = tree.draft_logits.roll(1, dims=1)
        return tree


def test_draft_logits_of_the_wrong_node_are_caught():
    expected = expected_triples(FakeLM(VOCAB, seed=2))
    assert p_value(rejection_engine(Misaligned, (1, 1)), expected) < 1e-6
