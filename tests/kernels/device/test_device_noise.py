"""The noise as each accelerator computes it: Random123's known answers, and the CPU's bits."""

import pytest
import torch

from helpers.noise_cases import KNOWN_ANSWERS, STREAMS
from inferlab.kernels import _registry
from inferlab.kernels.reference import noise


def ops_of(backend):
    return backend.ops if backend.ops is not None else _registry.BACKENDS[backend.name]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(backend, counter, key, expected):
    out = torch.zeros(4, dtype=torch.int32, device=backend.device)
    ops_of(backend).philox_block(out, *counter, *key)
    assert tuple(w & 0xFFFFFFFF for w in out.tolist()) == expected


@pytest.mark.parametrize(("seed", "position", "purpose"), STREAMS)
@pytest.mark.parametrize("size", [0, 1, 31, 5000])
def test_gumbel_rows_are_the_references_bits(backend, seed, position, purpose, size):
    out = torch.full((size,), float("nan"), device=backend.device)
    ops_of(backend).gumbel_row(seed, position, purpose, out)
    expected = noise.gumbel_row(seed, position, size, purpose)
    assert torch.equal(out.cpu().view(torch.int32), expected.view(torch.int32))
