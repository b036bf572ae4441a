"""verify_tree_match on accelerators: the very tokens of the CPU and of the reference."""

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.sampling_cases import (
    likely_tokens,
    random_logits,
    random_parents,
    random_sampling,
)
from inferlab.kernels import build_tree, reference, verify_tree_match

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "ties", "flat", "masked", "broken"]


# `backend` is the same for all examples.
random_examples = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def random_case(seed, batch, nodes, vocab, kind, dtype):
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, (batch, nodes, vocab), kind, dtype)
    parents = random_parents(rng, batch, nodes)
    links = build_tree(parents)
    sampling = random_sampling(rng, batch, vocab)
    seq_lens = torch.from_numpy(rng.integers(0, 100_000, batch).astype(np.int32))
    tokens = likely_tokens(rng, logits, parents, links, seq_lens, sampling)
    allowed = None if rng.random() < 0.7 else int(rng.integers(1, vocab + 1))
    return (logits, tokens, links, seq_lens, sampling), {"allowed_vocab": allowed}


@random_examples
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from([1, 3]),
    nodes=st.sampled_from([1, 2, 7, 64]),
    vocab=st.sampled_from([1, 2, 5, 100, 1000, 4097]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
)
def test_matches_the_cpu_and_the_reference(backend, seed, batch, nodes, vocab, kind, dtype):
    arguments, options = random_case(seed, batch, nodes, vocab, kind, dtype)
    got = backend.call(verify_tree_match, *arguments, **options)
    assert_same(got, verify_tree_match(*arguments, **options))
    assert_same(got, reference.verify_tree_match(*arguments, **options))
