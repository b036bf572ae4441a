"""sample against the reference and against what each parameter promises."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.isas import ISAS
from helpers.sampling_cases import random_logits, random_sampling
from inferlab import _C
from inferlab.kernels import SamplingTensors, reference, sample

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def restore_native_settings():
    yield
    _C.force_isa("auto")
    _C.set_num_threads(0)


def at(*shape):
    return torch.full(shape, 11, dtype=torch.int64)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from([1, 3]),
    nodes=st.sampled_from([1, 2, 7]),
    vocab=st.sampled_from([1, 19, 111, 1000, 4097]),
    kind=st.sampled_from(["normal", "ties", "flat", "masked", "broken"]),
    dtype=st.sampled_from(DTYPES),
    num_samples=st.sampled_from([1, 2, 5, 20]),
    isa=st.sampled_from(ISAS),
    threads=st.sampled_from([1, 2]),
)
def test_matches_the_reference(seed, batch, nodes, vocab, kind, dtype, num_samples, isa, threads):
    rng = np.random.default_rng(seed)
    logits = random_logits(rng, (batch, nodes, vocab), kind, dtype)
    sampling = random_sampling(rng, batch, vocab)
    positions = torch.from_numpy(rng.integers(0, 2**40, (batch, nodes)))
    options = {
        "purpose": int(rng.integers(0, 4)),
        "num_samples": num_samples,
        "allowed_vocab": None if rng.random() < 0.7 else int(rng.integers(1, vocab + 1)),
    }
    _C.force_isa(isa)
    _C.set_num_threads(threads)
    ours = sample(logits, positions, sampling, **options)
    tokens, scores = reference.sample(logits, positions, sampling, **options)
    assert torch.equal(ours, tokens)
    with_scores = torch.full(tokens.shape, torch.nan)
    assert torch.equal(sample(logits, positions, sampling, **options, scores=with_scores), tokens)
    assert torch.equal(with_scores, scores)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
        {"temperature": 1.3, "top_p": 0.95},
        {"temperature": 1.0, "top_k": 5000, "min_p": 1e-4},
    ],
)
def test_large_vocabulary_on_every_path(dtype, options):
    """The same token for any ISA, thread count and batch, and the reference's, at 150k columns."""
    logits = (torch.randn(2, 151_937, generator=torch.Generator().manual_seed(4)) * 2.5).to(dtype)
    sampling = SamplingTensors.of(2, seed=[3, 4], **options)
    expected, _ = reference.sample(logits, at(2), sampling, num_samples=3)
    for isa in ISAS:
        for threads in (1, 2):
            _C.force_isa(isa)
            _C.set_num_threads(threads)
            assert torch.equal(sample(logits, at(2), sampling, num_samples=3), expected)
            for b in range(2):
                alone = SamplingTensors.of(1, seed=3 + b, **options)
                assert torch.equal(
                    sample(logits[b : b + 1], at(1), alone, num_samples=3), expected[b : b + 1]
                )


def frequencies(row, draws, **options):
    """How often each token is drawn from one row, over `draws` seeds."""
    sampling = SamplingTensors.of(draws, seed=list(range(draws)), **options)
    tokens = sample(torch.tensor([row]).expand(draws, -1), at(draws), sampling)
    return np.bincount(tokens.flatten().numpy(), minlength=len(row))


def test_draws_follow_the_softmax():
    row = [1.0, 0.0, -1.0, 2.5, 0.3]
    counts = frequencies(row, 100_000, temperature=0.7)
    p = torch.softmax(torch.tensor(row, dtype=torch.float64) / 0.7, 0).numpy()
    assert scipy.stats.chisquare(counts, p * counts.sum()).pvalue > 1e-4


def test_filtered_draws_follow_the_renormalised_softmax():
    p = np.array([0.4, 0.3, 0.15, 0.1, 0.05])
    counts = frequencies(np.log(p).tolist(), 50_000, temperature=1.0, top_p=0.8)
    expected = np.array([0.4, 0.3, 0.15, 0, 0]) / 0.85
    assert counts[3:].sum() == 0
    assert scipy.stats.chisquare(counts[:3], expected[:3] * counts.sum()).pvalue > 1e-4


def test_several_samples_are_without_replacement():
    p = np.array([0.5, 0.3, 0.2])
    draws = 50_000
    sampling = SamplingTensors.of(draws, temperature=1.0, seed=list(range(draws)))
    logits = torch.tensor(np.log(p)).float().expand(draws, -1)
    pairs = sample(logits, at(draws), sampling, num_samples=2).numpy()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    counts = np.bincount(pairs[:, 0] * 3 + pairs[:, 1], minlength=9)
    expected = np.array(
        [[0 if i == j else p[i] * p[j] / (1 - p[i]) for j in range(3)] for i in range(3)]
    )
    used = expected.flatten() > 0
    assert scipy.stats.chisquare(counts[used], expected.flatten()[used] * draws).pvalue > 1e-4


@pytest.mark.parametrize("vocab", [19, 4097])
def test_top_k_1_is_argmax_on_ties(vocab):
    """Seen elsewhere: top_k = 1 kept every token tied with the largest."""
    logits = torch.zeros(64, vocab)
    logits[:, 7] = logits[:, 11] = 2.0
    seeds = list(range(64))
    sampled = sample(logits, at(64), SamplingTensors.of(64, temperature=1.0, top_k=1, seed=seeds))
    greedy = sample(logits, at(64), SamplingTensors.of(64, temperature=0.0, seed=seeds))
    assert sampled.flatten().tolist() == greedy.flatten().tolist() == [7] * 64


def test_top_k_keeps_exactly_k_on_ties():
    counts = frequencies([0.0] * 40, 4000, temperature=1.0, top_k=3)
    assert (counts[:3] > 0).all()
    assert counts[3:].sum() == 0


def test_negative_zero_ties_with_zero():
    logits = torch.tensor([[-1.0, -0.0, 0.0]])
    assert sample(logits, at(1), SamplingTensors.of(1, temperature=0.0)).item() == 1
    assert sample(logits, at(1), SamplingTensors.of(1, temperature=1.0, top_k=1)).item() == 1


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 9e-6, 1.1e-5, 1e-3])
def test_temperature_near_zero_is_argmax(temperature):
    """Seen elsewhere: dividing by the temperature before the greedy override gave inf and NaN."""
    logits = torch.tensor([[1.0, 5.0, 4.9, -torch.inf, 3e38]]).bfloat16()
    logits[0, 4] = -3e38
    assert sample(logits, at(1), SamplingTensors.of(1, temperature=temperature)).item() == 1


def test_top_p_takes_the_shortest_prefix_that_reaches_it():
    row = np.log([0.5, 0.25, 0.25]).tolist()
    assert set(np.flatnonzero(frequencies(row, 500, temperature=1.0, top_p=0.4))) == {0}
    assert set(np.flatnonzero(frequencies(row, 500, temperature=1.0, top_p=0.6))) == {0, 1}
    assert set(np.flatnonzero(frequencies(row, 500, temperature=1.0, top_p=0.9))) == {0, 1, 2}
    assert set(np.flatnonzero(frequencies([0.0] * 4, 500, temperature=1.0, top_p=0.5))) == {0, 1}


def test_top_p_counts_the_mass_that_top_k_left():
    row = np.log([0.4, 0.2, 0.2, 0.2]).tolist()  # after top-k 2: 2/3, 1/3
    kept = frequencies(row, 500, temperature=1.0, top_k=2, top_p=0.65)
    assert set(np.flatnonzero(kept)) == {0}


def test_min_p_is_relative_to_the_largest():
    row = np.log([0.6, 0.31, 0.09]).tolist()
    assert set(np.flatnonzero(frequencies(row, 500, temperature=1.0, min_p=0.5))) == {0, 1}
    assert set(np.flatnonzero(frequencies(row, 500, temperature=1.0, min_p=1.0))) == {0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padded_vocabulary_is_never_chosen(temperature):
    logits = torch.zeros(200, 32)
    logits[:, 20:] = 50.0
    sampling = SamplingTensors.of(200, temperature=temperature, seed=list(range(200)))
    tokens = sample(logits, at(200), sampling, allowed_vocab=20, num_samples=25)
    assert int(tokens.max()) < 20
    assert (tokens[:, 20:] == -1).all()
    logits[:, 20:] = torch.nan  # what lies there is not even read as a number
    assert (sample(logits, at(200), sampling, allowed_vocab=20) >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 64, 300, 20_000])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_rows_are_reported(dtype, vocab, temperature):
    rows = torch.zeros(5, vocab, dtype=dtype)
    rows[0, vocab - 1] = torch.nan
    rows[1, 0] = -torch.nan
    rows[2] = -torch.inf
    rows[3, vocab // 2] = torch.inf
    sampling = SamplingTensors.of(5, temperature=temperature)
    tokens = sample(rows, at(5), sampling, num_samples=2)
    assert (tokens[:4] == -1).all()
    assert (tokens[4] >= 0).all()


def test_fewer_survivors_than_samples():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]])
    for temperature in (0.0, 1.0):
        tokens = sample(
            logits, at(1), SamplingTensors.of(1, temperature=temperature), num_samples=4
        )
        assert sorted(tokens[0, :2].tolist()) == [0, 2]
        assert tokens[0, 2:].tolist() == [-1, -1]


def test_penalties_by_hand():
    logits = torch.tensor([[2.0, -2.0, 1.9, 0.0, 1.0]])
    common = {"prompt_tokens": [[0, 1]], "output_tokens": [[2, 2]]}

    def ranked(**penalties):
        sampling = SamplingTensors.of(1, temperature=0.0, **common, **penalties)
        return sample(logits, at(1), sampling, num_samples=5)[0].tolist()

    assert ranked() == [0, 2, 4, 3, 1]
    # 2 / 2 = 1, -2 * 2 = -4, 1.9 / 2: prompt and output both count, each token once
    assert ranked(repetition_penalty=2.0) == [0, 4, 2, 3, 1]
    assert ranked(presence_penalty=1.0) == [0, 4, 2, 3, 1]  # output only: 1.9 - 1
    assert ranked(frequency_penalty=1.0) == [0, 4, 3, 2, 1]  # twice in the output: 1.9 - 2
    assert ranked(presence_penalty=-3.0)[0] == 2
    assert ranked(logit_bias={1: 10.0, 0: -float("inf")}) == [1, 2, 4, 3, -1]


def test_row_past_two_to_the_32_elements():
    """Offsets are 64-bit. Memory is touched only where it is read."""
    vocab, batch = 1 << 16, (1 << 16) + 2
    logits = torch.empty(batch * vocab, dtype=torch.bfloat16).view(batch, vocab)
    logits[-1] = 0
    logits[-1, 4242] = 5
    tail = logits[-2:].view(2, 1, vocab)[1:]  # a view: the offset sits in its pointer
    assert sample(tail, at(1, 1), SamplingTensors.of(1)).item() == 4242
    # and with the offset in the index arithmetic: rows 0 and 2^16 + 1 of a strided view
    logits[0] = 0
    logits[0, 17] = 5
    ends = logits[:: batch - 1].view(2, 1, vocab)
    assert ends.stride(0) * 1 > 2**32
    assert sample(ends, at(2, 1), SamplingTensors.of(2)).flatten().tolist() == [17, 4242]


def test_strided_rows_and_numpy():
    logits = torch.randn(3, 8, 50)
    sampling = SamplingTensors.of(3, temperature=1.0, seed=5)
    strided = logits[:, ::2]
    expected = sample(strided.contiguous(), at(3, 4), sampling)
    assert torch.equal(sample(strided, at(3, 4), sampling), expected)
    arrays = sample(strided.numpy(), at(3, 4).numpy(), sampling)
    assert isinstance(arrays, np.ndarray)
    assert (arrays == expected.numpy()).all()
    with pytest.raises(ValueError, match="logits must be contiguous in its last dimension"):
        sample(torch.randn(50, 2).t(), at(2), SamplingTensors.of(2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"temperature": torch.tensor([-1.0])}, ValueError, r"temperature\[0\] is -1.0.*>= 0"),
        ({"temperature": torch.tensor([torch.nan])}, ValueError, r"temperature\[0\] is nan"),
        ({"top_p": torch.tensor([0.0])}, ValueError, r"top_p\[0\] is 0.0.*in \(0, 1\]"),
        ({"top_p": torch.tensor([1.5])}, ValueError, r"top_p\[0\] is 1.5"),
        ({"min_p": torch.tensor([-0.1])}, ValueError, r"min_p\[0\] is -0.1.*in \[0, 1\]"),
        ({"top_k": torch.tensor([-1], dtype=torch.int32)}, ValueError, r"top_k\[0\] is -1"),
        ({"top_k": torch.tensor([5])}, TypeError, "top_k has dtype int64; it must be int32"),
        ({"temperature": torch.tensor([1.0, 1.0])}, ValueError, r"temperature has shape \[2\]"),
        ({"repetition_penalty": torch.tensor([1.2])}, ValueError, "context_tokens"),
    ],
)
def test_bad_sampling_tensors(changes, error, message):
    good = SamplingTensors.of(1)
    fields = {
        name: getattr(good, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")
    }
    with pytest.raises(error, match=message):
        sample(torch.zeros(1, 4), at(1), SamplingTensors(**{**fields, **changes}))


def test_bad_arguments():
    good = SamplingTensors.of(1)
    with pytest.raises(ValueError, match="num_samples is 0"):
        sample(torch.zeros(1, 4), at(1), good, num_samples=0)
    with pytest.raises(ValueError, match="allowed_vocab is 0"):
        sample(torch.zeros(1, 4), at(1), good, allowed_vocab=0)
    with pytest.raises(ValueError, match="purpose is 4"):
        sample(torch.zeros(1, 4), at(1), good, purpose=4)
    with pytest.raises(TypeError, match="logits has dtype float64"):
        sample(torch.zeros(1, 4).double(), at(1), good)
    with pytest.raises(ValueError, match=r"positions has shape \[2\]; it must be \[1\]"):
        sample(torch.zeros(1, 4), at(2), good)
    with pytest.raises(ValueError, match="logits has shape"):
        sample(torch.zeros(4), at(1), good)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.5}, r"temperature is -0.5; it must be in \[0"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be in \(0"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"temperature": [0.1, 0.2]}, "temperature has 2 values; it must have 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": 1.5}, "repetition_penalty needs prompt_tokens"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias has -1"),
    ],
)
def test_bad_values_for_the_builder(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingTensors.of(1, **values)


def test_all_64_bits_of_the_seed_count():
    logits = torch.zeros(3, 5000)
    seeds = [5, 5 + 2**32, 5 - 2**63]
    tokens = sample(logits, at(3), SamplingTensors.of(3, temperature=1.0, seed=seeds))
    assert len(set(tokens.flatten().tolist())) == 3
    wrapped = SamplingTensors.of(1, temperature=1.0, seed=2**63 + 5)  # the same 64 bits
    assert sample(logits[:1], at(1), wrapped).item() == tokens[2].item()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend):
    def choose(logits, positions, sampling):
        return sample(logits * 2, positions, sampling, num_samples=2) + 1

    logits = torch.randn(2, 3, 40)
    sampling = SamplingTensors.of(
        2, temperature=0.9, top_k=5, presence_penalty=0.5, output_tokens=[[1], [2]]
    )
    compiled = torch.compile(choose, fullgraph=True, backend=backend)
    expected = choose(logits, at(2, 3), sampling)
    assert torch.equal(compiled(logits, at(2, 3), sampling), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 255, 256, 4096 + 300, 40_000])
def test_greedy_is_the_first_of_the_largest(vocab, dtype, isa):
    _C.force_isa(isa)
    rows = torch.randn(6, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    rows[1] = -rows[1].abs() - 0.5  # all negative
    rows[2] = rows[2].clamp(max=-0.0)  # the largest is a zero, of either sign
    rows[2, vocab // 2 :: 3] = 0.0
    rows[3, : vocab - 1] = -torch.inf
    rows[4] = 1.5  # all tie
    rows[5, vocab - 1] = 1000.0
    sampling = SamplingTensors.of(6, temperature=0.0)
    tokens = sample(rows, torch.zeros(6, dtype=torch.int64), sampling)[:, 0]
    first = [int((row == row.max()).nonzero()[0]) for row in rows.float()]
    assert tokens.tolist() == first


def test_scores_of_the_wrong_kind_are_refused():
    args = (torch.zeros(2, 9), at(2), SamplingTensors.of(2, temperature=1.0))
    with pytest.raises(TypeError, match="scores"):
        sample(*args, scores=torch.zeros(2, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="scores"):
        sample(*args, scores=torch.zeros(2, 2))
