"""sample on accelerators: the very tokens of the CPU and of the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.backends import random_examples
from helpers.sampling_cases import random_logits, random_sampling
from inferlab.kernels import SamplingTensors, reference, sample, sample_workspace

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "ties", "flat", "masked", "broken"]


def at(*shape):
    return torch.full(shape, 11, dtype=torch.int64)


@random_examples(25)
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
    tokens, scores = reference.sample(logits, positions, sampling, **options)
    assert torch.equal(got, tokens)
    scored, filled = backend.call(_sample_with_scores, logits, positions, sampling, **options)
    assert torch.equal(scored, tokens)
    assert torch.equal(filled, scores)


def _sample_with_scores(logits, *args, num_samples, **options):
    shape = (*logits.shape[:-1], num_samples)
    scores = torch.full(shape, torch.nan, device=logits.device)
    return sample(logits, *args, num_samples=num_samples, **options, scores=scores), scores


# What a draw from a row can go through. Top-p alone is found among the tokens near the largest, or
# below them; ties and large k need more rounds than one.
PATHS = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.8},
    "cold": {"temperature": 0.02, "top_k": 50, "top_p": 0.999},
    "hot": {"temperature": 30.0, "top_p": 0.97},
    "top_k": {"temperature": 1.0, "top_k": 50},
    "top_k and top_p": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
    "large top_k": {"temperature": 1.0, "top_k": 2000},
    "large top_k and top_p": {"temperature": 1.0, "top_k": 2000, "top_p": 0.93},
    "top_p": {"temperature": 1.3, "top_p": 0.95},
    "top_p near 1": {"temperature": 1.0, "top_p": 0.9999},
    "min_p": {"temperature": 1.0, "min_p": 0.003},
    "all": {"temperature": 1.1, "top_k": 1200, "top_p": 0.98, "min_p": 1e-4},
}


@pytest.mark.parametrize("kind", ["normal", "ties", "flat", "masked"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [1, 4])
def test_every_path(backend, path, kind, rows):
    """Several blocks share a row, and one block has it for itself; rows begin at odd addresses."""
    rng = np.random.default_rng(len(path) + rows)
    dtype = DTYPES[(len(path) + len(kind)) % 3]
    logits = random_logits(rng, (rows, 3001), kind, dtype)
    sampling = SamplingTensors.of(rows, seed=list(range(rows)), **PATHS[path])
    got = backend.call(sample, logits, at(rows), sampling)
    assert torch.equal(got, sample(logits, at(rows), sampling))


@pytest.mark.parametrize(
    ("path", "dtype"),
    zip(["plain", "large top_k and top_p", "top_p near 1"], DTYPES, strict=True),
)
def test_large_vocabulary(backend, path, dtype):
    logits = random_logits(np.random.default_rng(6), (1, 40_000), "ties", dtype)
    sampling = SamplingTensors.of(1, seed=3, **PATHS[path])
    got = backend.call(sample, logits, at(1), sampling)
    assert torch.equal(got, sample(logits, at(1), sampling))


@pytest.mark.parametrize("vocab", [19, 4097])
@pytest.mark.parametrize("rows", [1, 9])
def test_top_k_1_is_argmax_on_ties(backend, vocab, rows):
    logits = torch.zeros(rows, vocab)
    logits[:, 7] = logits[:, 11] = 2.0
    seeds = list(range(rows))
    for options in ({"temperature": 1.0, "top_k": 1}, {"temperature": 0.0}):
        got = backend.call(
            sample, logits, at(rows), SamplingTensors.of(rows, seed=seeds, **options)
        )
        assert got.flatten().tolist() == [7] * rows


def test_negative_zero_ties_with_zero(backend):
    logits = torch.tensor([[-1.0, -0.0, 0.0]])
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 1}):
        assert backend.call(sample, logits, at(1), SamplingTensors.of(1, **options)).item() == 1


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 9e-6, 1.1e-5, 1e-3, 3e38])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}])
def test_extreme_temperatures(backend, temperature, filters):
    logits = torch.tensor([[1.0, 5.0, 4.9, -torch.inf, -3e38, 3e38, -1e-40]])
    for row in (logits, logits[:, :5].contiguous(), logits[:, 3:].contiguous()):
        sampling = SamplingTensors.of(1, temperature=temperature, seed=3, **filters)
        expected = sample(row, at(1), sampling, num_samples=3)
        assert torch.equal(backend.call(sample, row, at(1), sampling, num_samples=3), expected)
        one = backend.call(sample, row, at(1), sampling)
        assert torch.equal(one[:, 0], expected[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 2500])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("num_samples", [1, 2])
def test_broken_rows_are_reported(backend, dtype, vocab, temperature, num_samples):
    rows = torch.zeros(5, vocab, dtype=dtype)
    rows[0, vocab - 1] = torch.nan
    rows[1, 0] = -torch.nan
    rows[2] = -torch.inf
    rows[3, vocab // 2] = torch.inf
    for some in (rows, rows[:1], rows[3:4]):
        sampling = SamplingTensors.of(len(some), temperature=temperature, top_p=0.9)
        tokens = backend.call(sample, some, at(len(some)), sampling, num_samples=num_samples)
        assert (tokens[:4] == -1).all()
        assert (tokens[4:] >= 0).all()


@pytest.mark.parametrize("num_samples", [64, 257, 900])
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 800}]
)
@pytest.mark.parametrize("rows", [1, 4])
def test_many_samples(backend, num_samples, options, rows):
    """More than a block lists, more than there are; several blocks per row and one."""
    logits = torch.randn(rows, 1500, generator=torch.Generator().manual_seed(rows)).half()
    logits[0, 5:40] = 0.5
    logits[0, 700:] = -torch.inf
    sampling = SamplingTensors.of(rows, seed=list(range(rows)), **options)
    expected = sample(logits, at(rows), sampling, num_samples=num_samples)
    got = backend.call(sample, logits, at(rows), sampling, num_samples=num_samples)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalties_and_biases(backend, rows, dtype):
    """Long contexts, tokens many times in them and biased several times."""
    rng = np.random.default_rng(rows)
    logits = random_logits(rng, (rows, 3, 3001), "normal", dtype)
    sampling = SamplingTensors.of(
        rows,
        temperature=rng.choice([0.0, 0.8], rows).tolist(),
        repetition_penalty=1.2,
        presence_penalty=-0.3,
        frequency_penalty=0.01,
        prompt_tokens=rng.integers(0, 300, (rows, 700)).tolist(),
        output_tokens=rng.integers(0, 3001, (rows, 500)).tolist(),
        logit_bias={3: 2.5, 2999: 1.5},
        seed=list(range(rows)),
    )
    sampling.bias_tokens[:] = 3  # sums of floats depend on their order
    sampling.bias_values[:, 0] = 1e-3
    expected = sample(logits, at(rows, 3), sampling, num_samples=5)
    assert torch.equal(backend.call(sample, logits, at(rows, 3), sampling, num_samples=5), expected)
    assert torch.equal(expected[..., :1], backend.call(sample, logits, at(rows, 3), sampling))


def test_values_out_of_range_are_skipped(backend):
    """On a device nobody has looked at them: they must not lead out of bounds."""
    logits = torch.zeros(4, 3000)
    logits[:, 9] = 50.0
    good = SamplingTensors.of(
        4, temperature=1.0, top_k=50, top_p=0.9, presence_penalty=0.5, output_tokens=[[1]] * 4
    )
    wild = torch.tensor([-1, 2**31 - 1, -(2**31), 3000], dtype=torch.int32)
    sampling = SamplingTensors(
        good.temperature,
        torch.tensor([-5, 2**31 - 1, 1, 2], dtype=torch.int32),
        torch.tensor([-1.0, 7.0, torch.nan, 0.0]),
        torch.tensor([-1.0, 7.0, torch.nan, 0.5]),
        good.seed,
        presence_penalty=good.presence_penalty,
        context_tokens=wild.view(4, 1).expand(4, 2).contiguous(),
        context_lens=torch.tensor([-4, 2**31 - 1, 2, 1], dtype=torch.int32),
        prompt_lens=torch.tensor([7, -9, 2**31 - 1, 0], dtype=torch.int32),
        bias_tokens=wild.view(4, 1),
        bias_values=torch.ones(4, 1),
    )
    assert backend.call(sample, logits, at(4), sampling).flatten().tolist() == [9] * 4


def test_strided_rows_that_begin_anywhere(backend):
    logits = torch.randn(3, 8, 4101).bfloat16()[:, ::2, 1:]
    sampling = SamplingTensors.of(3, temperature=[0.0, 1.0, 0.9], top_p=[1.0, 1.0, 0.9], seed=5)
    expected = sample(logits.contiguous(), at(3, 4), sampling, num_samples=2)
    with backend.active():
        moved = backend.to(logits)
        got = sample(moved, backend.to(at(3, 4)), backend.to(sampling), num_samples=2)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_one_workspace_for_all_calls(backend, num_samples):
    """It may hold anything, and `out` is written to the end."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        logits = random_logits(rng, (3, 2500), "normal", torch.bfloat16)
        sampling = random_sampling(rng, 3, 2500)
        expected = sample(logits, at(3), sampling, num_samples=num_samples)
        moved = backend.to((logits, at(3), sampling))
        with backend.active():
            workspace = sample_workspace(moved[0], moved[2], num_samples)
            if workspace is None:  # Metal: only where penalties need a copy of the rows
                assert backend.is_metal
                continue
            workspace.fill_(0xFF)
            out = backend.to(torch.full_like(expected, 77))
            for _ in range(2):
                got = sample(*moved, num_samples=num_samples, out=out, workspace=workspace)
                assert got is out
                assert torch.equal(got.cpu(), expected)
            with pytest.raises(ValueError, match="workspace has 0 bytes; it must have at least"):
                sample(*moved, num_samples=num_samples, workspace=workspace[:0])
