"""The noise: Random123's known answers, and the same bits in C++, in SIMD and in the reference."""

import math

import numpy as np
import pytest
import torch

from helpers.isas import ISAS
from helpers.noise_cases import KNOWN_ANSWERS, STREAMS
from inferlab import _C
from inferlab.kernels.noise import PURPOSE_ACCEPT
from inferlab.kernels.reference import noise


@pytest.fixture(params=ISAS)
def isa(request):
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa("auto")


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    out = torch.empty(4, dtype=torch.int32)
    _C.philox_block(out, *counter, *key)
    assert tuple(word & 0xFFFFFFFF for word in out.tolist()) == expected
    words = [torch.tensor(w) for w in counter], [torch.tensor(w) for w in key]
    assert tuple(int(w) for w in noise.philox4x32_10(tuple(words[0]), tuple(words[1]))) == expected


@pytest.mark.parametrize(("seed", "position", "purpose"), STREAMS)
@pytest.mark.parametrize("size", [1, 31, 20000])
def test_simd_noise_is_the_references_bits(isa, seed, position, purpose, size):
    out = torch.empty(size)
    _C.gumbel_row(seed, position, purpose, out)
    expected = noise.gumbel_row(seed, position, size, purpose)
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


def test_simd_noise_of_extreme_words():
    # Words cannot be chosen through the seed; the reference is exact for all, so check it here.
    words = torch.tensor([0, 1, 2, 127, 2**24, 2**31, 2**32 - 2**8, 2**32 - 1])
    g = noise.gumbel_from_words(words).double()
    assert torch.isfinite(g).all()
    assert float(g[0]) == pytest.approx(33 * math.log(2), abs=1e-5)  # the largest there is
    u = np.minimum((words.numpy() + 0.5) / 2**32, 1 - 2.0**-24)
    np.testing.assert_allclose(g.numpy(), -np.log(-np.log1p(-u)), rtol=2e-6, atol=2e-7)


def test_noise_against_float64():
    tokens = torch.arange(1 << 17)
    words = noise.noise_words(torch.tensor(99), torch.tensor(7), tokens, 0)
    u = np.minimum((words.numpy().astype(np.float64) + 0.5) / 2**32, 1 - 2.0**-24)
    exact = -np.log(-np.log1p(-u))
    error = np.abs(noise.gumbel_from_words(words).double().numpy() - exact)
    assert error[exact > 0].max() < 2e-6
    assert error.max() < 0.04  # the lower tail counts u in steps of 2^-24
    assert error.mean() < 1e-6


def test_noise_is_gumbel():
    out = torch.empty(1 << 18)
    _C.gumbel_row(1, 2, 0, out)
    assert float(out.mean()) == pytest.approx(0.5772, abs=0.015)
    assert float(out.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)


@pytest.mark.parametrize("change", ["seed", "seed_high", "position", "purpose"])
def test_streams_differ(change):
    base, other = {"seed": 7, "position": 7, "purpose": 1}, {"seed": 7, "position": 7, "purpose": 1}
    if change == "seed_high":
        other["seed"] += 1 << 32
    else:
        other[change] += 1
    rows = [noise.gumbel_row(s["seed"], s["position"], 1000, s["purpose"]) for s in (base, other)]
    assert (rows[0] == rows[1]).sum() < 3
    assert abs(float(np.corrcoef(rows[0].numpy(), rows[1].numpy())[0, 1])) < 0.12


def test_uniform_is_inside_the_open_interval():
    values = [noise.uniform(3, p, 1, PURPOSE_ACCEPT) for p in range(200)]
    assert min(values) > 0
    assert max(values) < 1
    assert 0.4 < sum(values) / len(values) < 0.6
