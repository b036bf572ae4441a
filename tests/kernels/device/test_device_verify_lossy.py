"""verify_tree_lossy on accelerators: the CPU's tokens, and the three rules by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.backends import random_examples
from helpers.sampling_cases import LOSSY_RULES, chain, random_logits, random_walk
from inferlab import _C
from inferlab.kernels import SamplingTensors, verify_tree_lossy

P = [0.4, 0.25, 0.2, 0.1, 0.05]


def accepted(backend, policy, threshold, p=P, temperature=1.0, **options):
    """The tokens that are entered as the only child of a root with probabilities p."""
    batch = len(p)
    logits = (
        torch.log(torch.tensor(p, dtype=torch.float64)).float().expand(batch, 2, -1).contiguous()
    )
    tokens = torch.tensor([[0, t] for t in range(batch)], dtype=torch.int32)
    sampling = SamplingTensors.of(batch, temperature=temperature, **options)
    lens = torch.full((batch,), 3, dtype=torch.int32)
    arguments = (logits, tokens, chain(2, batch), lens, sampling, policy, threshold)
    result = backend.call(verify_tree_lossy, *arguments)
    return (result.num_accepted == 2).nonzero().flatten().tolist()


BY_HAND = [
    ("conf_threshold", 0.0, {}, [0, 1, 2, 3, 4]),
    ("conf_threshold", 0.15, {}, [0, 1, 2]),
    ("conf_threshold", 1.0, {}, []),
    ("conf_threshold", 0.3, {"top_k": 2}, [0, 1]),  # renormalised: 0.62, 0.38
    ("conf_threshold", 0.15, {"temperature": 0.5}, [0, 1]),
    ("conf_threshold", 0.15, {"temperature": 0.0, "top_k": 1, "top_p": 0.1}, [0, 1, 2]),
    ("topk_agree", 1, {}, [0]),
    ("topk_agree", 50, {}, [0, 1, 2, 3, 4]),
    ("topk_agree", 3, {"top_k": 2}, [0, 1]),  # what the filter drops has p = 0
    ("topk_agree", 2, {"p": [0.2] * 5}, [0, 1]),  # ties to the lower id
    ("topk_agree", 5, {"p": [0.6, 0.4, 0.0, 0.0, 0.0]}, [0, 1]),
    ("typical", 0.0, {}, []),
    ("typical", 0.2, {}, [1]),  # nearest to the entropy: 1, 2, 0, 3, 4
    ("typical", 0.3, {}, [1, 2]),
    ("typical", 0.5, {}, [0, 1, 2]),
    ("typical", 1.0, {}, [0, 1, 2, 3, 4]),
    ("typical", 1.0, {"p": [0.6, 0.4, 0.0, 0.0, 0.0]}, [0, 1]),
]


@pytest.mark.parametrize(("policy", "threshold", "options", "expected"), BY_HAND)
def test_the_rules_by_hand(backend, policy, threshold, options, expected):
    assert accepted(backend, policy, threshold, **options) == expected


def test_every_rule_is_worked_out_by_hand():
    assert {policy for policy, *_ in BY_HAND} == set(_C.LOSSY_POLICIES)


@random_examples(30)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from([1, 2, 3]),
    nodes=st.sampled_from([1, 2, 7, 12]),
    vocab=st.sampled_from([1, 19, 111, 1000, 2500]),
    kind=st.sampled_from(["normal", "ties", "flat", "masked", "broken"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rule=st.sampled_from(LOSSY_RULES),
)
def test_gives_the_cpus_tokens(backend, seed, batch, nodes, vocab, kind, dtype, rule):
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, (batch, nodes, vocab), kind, dtype)
    walk, allowed = random_walk(rng, logits)
    arguments = (logits, *walk, *rule)
    ours = backend.call(verify_tree_lossy, *arguments, allowed_vocab=allowed)
    theirs = verify_tree_lossy(*arguments, allowed_vocab=allowed)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("policy", "threshold", "dtype"),
    [
        ("conf_threshold", 1e-4, torch.float32),
        ("topk_agree", 3000, torch.bfloat16),
        ("typical", 0.5, torch.float16),
    ],
)
def test_many_blocks_share_a_row(backend, policy, threshold, dtype):
    rng = np.random.default_rng(8)
    logits = random_logits(rng, (1, 4, 11_000), "normal", dtype)
    links, lens = chain(4), torch.tensor([5], dtype=torch.int32)
    sampling = SamplingTensors.of(1, temperature=0.9, top_p=0.97, seed=4)
    tokens = torch.cat([torch.zeros(1, 1).long(), logits[:, :3].float().argmax(-1)], 1).int()
    arguments = (logits, tokens, links, lens, sampling, policy, threshold)
    ours = backend.call(verify_tree_lossy, *arguments)
    theirs = verify_tree_lossy(*arguments)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert ours.num_accepted.item() > 1


def test_tokens_out_of_the_vocabulary_are_never_accepted(backend):
    """The CPU refuses them; on a device nobody looks at them before."""
    logits, lens = torch.zeros(1, 3, 50), torch.zeros(1, dtype=torch.int32)
    sampling = SamplingTensors.of(1, temperature=1.0, seed=1)
    for policy, threshold in (("conf_threshold", 0.0), ("topk_agree", 50), ("typical", 1.0)):
        for bad in (-1, 50, 2**31 - 1, -(2**31)):
            tokens = torch.tensor([[0, bad, 4]], dtype=torch.int32)
            arguments = (logits, tokens, chain(3), lens, sampling, policy, threshold)
            got = backend.call(verify_tree_lossy, *arguments)
            assert got.num_accepted.tolist() == [1]
            assert 0 <= got.accepted_tokens[0, 0] < 50
