"""sample on accelerators: the very tokens of the CPU and of the reference."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.sampling_cases import random_logits, random_sampling
from inferlab.kernels import SamplingTensors, reference, sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "ties", "flat", "masked", "broken"]

# `backend` is the same for all examples.
random_examples = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def at(*shape):
    return torch.full(shape, 11, dtype=torch.int64)


@random_examples
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from([1, 3]),
    nodes=st.sampled_from([1, 2, 7]),
    vocab=st.sampled_from([1, 2, 5, 100, 1000, 4097]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    num_samples=st.sampled_from([1, 1, 2, 20]),
)
def test_matches_the_cpu_and_the_reference(
    backend, seed, batch, nodes, vocab, kind, dtype, num_samples
):
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, (batch, nodes, vocab), kind, dtype)
    sampling = random_sampling(rng, batch, vocab)
    positions = torch.from_numpy(rng.integers(0, 2**40, (batch, nodes)))
    options = {
        "purpose": int(rng.integers(0, 4)),
        "num_samples": num_samples,
        "allowed_vocab": None if rng.random() < 0.7 else int(rng.integers(1, vocab + 1)),
    }
    got = backend.call(sample, logits, positions, sampling, **options)
    assert torch.equal(got, sample(logits, positions, sampling, **options))
    assert torch.equal(got, reference.sample(logits, positions, sampling, **options))


# What a draw from a row can go through. Top-p alone is found among the tokens near the largest, or
# below them; ties and large k need more rounds than one.
PATHS = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.8},
    "cold": {"temperature": 0.02, "top_k": 50, "top_p": 0.999},
    "hot": {"temperature": 30.0, "top_p": 0.97},
    "top_k": {"temperature": 1.0, "top_k": 50},
    "top_k and top_p": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "large top_k": {"temperature": 1.0, "top_k": 20_000},
    "large top_k and top_p": {"temperature": 1.0, "top_k": 20_000, "top_p": 0.93},
    "top_p": {"temperature": 1.3, "top_p": 0.95},
    "top_p near 1": {"temperature": 1.0, "top_p": 0.9999},
    "min_p": {"temperature": 1.0, "min_p": 0.003},
    "all": {"temperature": 1.1, "top_k": 3000, "top_p": 0.98, "min_p": 1e-4},
}


@pytest.mark.parametrize("kind", ["normal", "ties", "flat", "masked"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [1, 4])
def test_large_vocabulary_on_every_path(backend, path, kind, rows):
    """Several blocks share a row, and one block has it for itself; rows begin at odd addresses."""
    generator = np.random.default_rng(len(path) + rows)
    dtype = DTYPES[(len(path) + len(kind)) % 3]
    logits = random_logits(generator, (rows, 40_001), kind, dtype)
    sampling = SamplingTensors.of(rows, seed=list(range(rows)), **PATHS[path])
    got = backend.call(sample, logits, at(rows), sampling)
    assert torch.equal(got, sample(logits, at(rows), sampling))
