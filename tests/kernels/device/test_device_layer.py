"""The layer's small ops on accelerators: moves and single operations bit for bit, sums closely."""

import pytest
import torch

from inferlab import kernels
from inferlab.kernels.reference import layer as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (actual.double() - expected.double()).abs().max()
    assert error <= TOLERANCE[dtype] * max(1.0, float(expected.abs().max())), float(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 19, 64, 111, 160, 1024, 2050, 5120])
def test_rms_norm(backend, dim, dtype):
    x, weight = random(3, 5, dim, dtype=dtype), random(dim, dtype=dtype, seed=1)
    expected = reference.rms_norm(x.double(), weight.double(), 1e-5)
    assert_close(backend.call(kernels.rms_norm, x, weight, 1e-5), expected, dtype)
    shifted = reference.rms_norm(x.double(), weight.double(), 1e-5, offset=1.0)
    assert_close(backend.call(kernels.rms_norm, x, weight, 1e-5, offset=1.0), shifted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_where_the_layer_does(backend, dtype):
    """A row of equal squares is normed exactly, so that only the two roundings are left."""
    x = torch.where(random(4, 64, dtype=torch.float32) > 0, 2.0, -2.0).to(dtype)
    weight = random(64, dtype=dtype, seed=1)
    got = backend.call(kernels.rms_norm, x, weight, 0.0, offset=1.0)
    assert torch.equal(got, reference.rms_norm(x, weight, 0.0, offset=1.0))


@pytest.mark.parametrize("first", [8, 3])
def test_rms_norm_reads_rows_that_are_apart(backend, first):
    wide, weight = random(7, 96, dtype=torch.float32), random(40, dtype=torch.float32, seed=1)
    x = wide[:, first : first + 40]
    expected = reference.rms_norm(x, weight)
    assert_close(backend.call(kernels.rms_norm, x, weight), expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 16, 111, 448, 3000])
def test_silu_mul(backend, dim, dtype):
    x = 4 * random(5, 2 * dim, dtype=dtype)
    assert_close(backend.call(kernels.silu_mul, x), reference.silu_mul(x.double()), dtype)


def test_silu_mul_far_out_is_zero_or_the_gate(backend):
    gate = torch.tensor([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4] * 6)
    out = backend.call(kernels.silu_mul, torch.cat((gate, torch.ones_like(gate)))[None])[0]
    assert torch.equal(out[gate > 0], gate[gate > 0])
    assert (out[gate < 0].abs() < 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (64, 16), (40, 40), (80, 24), (18, 6)])
@pytest.mark.parametrize("ragged", [False, True])
def test_rope_append(backend, dim, rotary, ragged, dtype):
    batch, nodes, q_heads, kv_heads = 2, 5, 6, 2
    qkv = random(batch, nodes, q_heads + 2 * kv_heads, dim, dtype=dtype)
    q, k, v = qkv.split([q_heads, kv_heads, kv_heads], dim=2)
    angles = random(1 if ragged else batch, nodes, rotary, dtype=torch.float32, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pools = [random(11, 4, kv_heads, dim, dtype=dtype, seed=s) for s in (2, 3)]
    table = torch.tensor([[3, 7, 0, 9], [10, 2, 5, 1]], dtype=torch.int32)
    lens = torch.tensor([6, 2], dtype=torch.int32)
    counts = torch.tensor([5, 3], dtype=torch.int32) if ragged else None
    arguments = (q, k, v, cos, sin, *pools, table, lens)
    options = {"node_offset": 1, "num_nodes": counts}
    got = backend.call_in_place(kernels.rope_append, *arguments, **options)
    q = q.clone()
    reference.rope_append(q, *arguments[1:], **options)
    for ours, theirs in zip(got, (q, *arguments[1:]), strict=True):
        assert torch.equal(ours, theirs)


def test_rope_append_skips_slots_that_do_not_exist(backend):
    q, k = random(1, 3, 2, 8, dtype=torch.float32), random(1, 3, 1, 8, dtype=torch.float32)
    one, zero = torch.ones(1, 3, 8), torch.zeros(1, 3, 8)
    pool = torch.randn(2, 4, 1, 8)
    for row, length, written in (([5], 0, {}), ([1], 2, {0: 2, 1: 3}), ([0], -1, {1: 0, 2: 1})):
        table = torch.tensor([row], dtype=torch.int32)
        lens = torch.tensor([length], dtype=torch.int32)
        got = backend.call_in_place(
            kernels.rope_append, q, k, k, one, zero, pool, -pool, table, lens
        )
        k_pool, v_pool = pool.clone(), -pool
        for node, slot in written.items():
            k_pool[row[0], slot] = v_pool[row[0], slot] = k[0, node]
        assert torch.equal(got[0], q)
        assert torch.equal(got[5], k_pool)
        assert torch.equal(got[6], v_pool)


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (1, 32, 5),  # one chunk: most warps have none
        (3, 40, 16),  # no multiple of 32: torch's
        (8, 288, 33),
        (9, 512, 32),
        (16, 1056, 70),
        (17, 64, 40),  # more rows: torch's
    ],
)
def test_linear(backend, rows, inputs, outputs, dtype):
    x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1)
    bias, residual = (random(*size, dtype=dtype, seed=2) for size in ((outputs,), (rows, outputs)))
    product = x.double() @ weight.double().T
    assert_close(backend.call(kernels.linear, x, weight), product, dtype)
    got = backend.call(kernels.linear, x, weight, bias, residual, constant_weight=True)
    assert_close(got, product + bias.double() + residual.double(), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_linear_of_a_row_does_not_depend_on_the_rows_beside_it(backend, dtype):
    x, weight = random(16, 544, dtype=dtype), random(40, 544, dtype=dtype, seed=1)
    if backend.is_metal:
        pytest.skip("torch's product there")
    alone = torch.cat([backend.call(kernels.linear, x[i : i + 1], weight) for i in range(16)])
    for rows in (2, 8, 9, 16):
        assert torch.equal(backend.call(kernels.linear, x[:rows], weight), alone[:rows])
        assert torch.equal(backend.call(kernels.linear, x[-rows:], weight), alone[-rows:])


@pytest.mark.parametrize("dtype", HALVES)
def test_linear_reads_rows_that_are_apart(backend, dtype):
    wide, weight = random(5, 96, dtype=dtype), random(7, 64, dtype=dtype, seed=1)
    for first in (0, 8, 1):  # the last is not aligned: torch's
        x = wide[:, first : first + 64]
        assert_close(backend.call(kernels.linear, x, weight), x.double() @ weight.double().T, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_linear_rounds_the_product_before_it_adds_the_residual(backend, dtype):
    x, weight = random(4, 64, dtype=dtype), random(24, 64, dtype=dtype, seed=1)
    residual = random(4, 24, dtype=dtype, seed=2)
    product = backend.call(kernels.linear, x, weight)
    got = backend.call(kernels.linear, x, weight, None, residual)
    assert torch.equal(got, product + residual)
