"""verify_tree_lossy: the three rules by hand and against the reference."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sampling_cases import (
    LOSSY_RULES,
    chain,
    random_logits,
    random_walk,
)
from inferlab import _C
from inferlab.kernels import (
    SamplingTensors,
    build_tree,
    reference,
    sample,
    verify_tree_lossy,
)

P = [0.4, 0.25, 0.2, 0.1, 0.05]


@pytest.fixture(autouse=True)
def restore_native_settings():
    yield
    _C.force_isa("auto")
    _C.set_num_threads(0)


def accepts(token, policy, threshold, p=P, temperature=1.0, **options):
    """Whether the only child of the root is entered, for a root row of probabilities p."""
    logits = torch.log(torch.tensor(p, dtype=torch.float64)).float().expand(1, 2, -1)
    tokens = torch.tensor([[0, token]], dtype=torch.int32)
    sampling = SamplingTensors.of(1, temperature=temperature, **options)
    lens = torch.tensor([3], dtype=torch.int32)
    result = verify_tree_lossy(logits, tokens, chain(2), lens, sampling, policy, threshold)
    return int(result.num_accepted) == 2


def accepted(policy, threshold, p=P, **options):
    return [t for t in range(len(p)) if accepts(t, policy, threshold, p, **options)]


def test_conf_threshold():
    assert accepted("conf_threshold", 0.0) == [0, 1, 2, 3, 4]
    assert accepted("conf_threshold", 0.15) == [0, 1, 2]
    assert accepted("conf_threshold", 0.39) == [0]
    assert accepted("conf_threshold", 1.0) == []
    assert accepted("conf_threshold", 0.3, top_k=2) == [0, 1]  # renormalised: 0.62, 0.38
    assert accepted("conf_threshold", 0.15, temperature=0.5) == [0, 1]  # p^2: .58 .23 .15- .04 .01


def test_topk_agree():
    assert accepted("topk_agree", 1) == [0]
    assert accepted("topk_agree", 3) == [0, 1, 2]
    assert accepted("topk_agree", 50) == [0, 1, 2, 3, 4]
    assert accepted("topk_agree", 3, top_k=2) == [0, 1]  # what the filter drops has p = 0
    assert accepted("topk_agree", 2, p=[0.2] * 5) == [0, 1]  # ties to the lower id


def test_every_rule_is_among_the_random_walks():
    assert {policy for policy, _ in LOSSY_RULES} == set(_C.LOSSY_POLICIES)


def test_typical():
    # Entropy 1.415; |-log p - H|: 0.498, 0.028, 0.195, 0.888, 1.581: the order is 1 2 0 3 4.
    information = [abs(-math.log(v) + sum(w * math.log(w) for w in P)) for v in P]
    assert sorted(range(5), key=information.__getitem__) == [1, 2, 0, 3, 4]
    assert accepted("typical", 0.2) == [1]
    assert accepted("typical", 0.3) == [1, 2]
    assert accepted("typical", 0.5) == [0, 1, 2]
    assert accepted("typical", 1.0) == [0, 1, 2, 3, 4]
    assert accepted("typical", 0.0) == []


@pytest.mark.parametrize(
    ("policy", "threshold"), [("conf_threshold", 0.0), ("topk_agree", 5), ("typical", 1.0)]
)
def test_zero_probability_is_never_accepted(policy, threshold):
    p = [0.6, 0.4, 0.0, 0.0, 0.0]
    assert accepted(policy, threshold, p=p) == [0, 1]
    assert accepted(policy, threshold, p=p, temperature=0.0) == [0, 1]


def test_temperature_zero_judges_the_untruncated_softmax():
    """A one-hot p would turn every policy into the exact one."""
    assert accepted("conf_threshold", 0.15, temperature=0.0) == [0, 1, 2]
    assert accepted("conf_threshold", 0.15, temperature=0.0, top_k=1, top_p=0.1) == [0, 1, 2]
    assert accepted("topk_agree", 2, temperature=0.0, top_k=1) == [0, 1]
    assert accepted("typical", 0.3, temperature=0.0) == [1, 2]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_bonus_is_the_targets_own_choice(temperature):
    logits = torch.randn(1, 2, 200)
    sampling = SamplingTensors.of(1, temperature=temperature, top_p=0.9, seed=3)
    tokens = torch.tensor([[0, int(logits[0, 0].argmin())]], dtype=torch.int32)
    lens = torch.tensor([6], dtype=torch.int32)
    for policy, threshold in [("conf_threshold", 0.9), ("topk_agree", 2), ("typical", 0.1)]:
        result = verify_tree_lossy(logits, tokens, chain(2), lens, sampling, policy, threshold)
        assert result.num_accepted.tolist() == [1]
        expected = sample(logits[:, 0], torch.tensor([7]), sampling)
        assert result.accepted_tokens[0, 0] == expected[0, 0]


def test_first_accepted_child_is_entered_not_the_best():
    links = build_tree(torch.tensor([[-1, 0, 0, 0]], dtype=torch.int32))
    logits = torch.log(torch.tensor(P)).expand(1, 4, -1)
    tokens = torch.tensor([[0, 4, 2, 0]], dtype=torch.int32)
    lens = torch.tensor([3], dtype=torch.int32)
    sampling = SamplingTensors.of(1, temperature=1.0)
    result = verify_tree_lossy(logits, tokens, links, lens, sampling, "conf_threshold", 0.1)
    assert result.accepted_nodes.tolist() == [[0, 2, -1, -1]]
    assert result.accepted_tokens[0, 0] == 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from([1, 3]),
    nodes=st.sampled_from([1, 2, 7, 64]),
    vocab=st.sampled_from([1, 19, 111, 1000, 4097, 20_000]),
    kind=st.sampled_from(["normal", "ties", "flat", "masked", "broken"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rule=st.sampled_from(LOSSY_RULES),
    isa=st.sampled_from(["auto", _C.build_info()["isas"][0]]),
    threads=st.sampled_from([1, 2]),
)
def test_matches_the_reference(seed, batch, nodes, vocab, kind, dtype, rule, isa, threads):
    rng = np.random.default_rng(seed)
    nodes = min(nodes, 7) if vocab > 5000 else nodes
    logits = random_logits(rng, (batch, nodes, vocab), kind, dtype)
    walk, allowed = random_walk(rng, logits)
    arguments = (logits, *walk, *rule)
    _C.force_isa(isa)
    _C.set_num_threads(threads)
    ours = verify_tree_lossy(*arguments, allowed_vocab=allowed)
    theirs = reference.verify_tree_lossy(*arguments, allowed_vocab=allowed)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("policy", "threshold", "message"),
    [
        (
            "greedy",
            0.5,
            "policy is 'greedy'; it must be one of conf_threshold, topk_agree, typical",
        ),
        ("conf_threshold", 1.5, r"threshold is 1.5; it must be in \[0, 1\] for conf_threshold"),
        ("conf_threshold", math.nan, "threshold is nan"),
        ("typical", -0.1, "threshold is -0.1"),
        ("topk_agree", 0, "threshold is 0.0; it must be k, in"),
    ],
)
def test_bad_arguments(policy, threshold, message):
    with pytest.raises(ValueError, match=message):
        accepts(0, policy, threshold)
