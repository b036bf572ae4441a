"""The ops between attention and the products, against torch, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.isas import ISAS
from helpers.kv_cases import BITS_8, pages_of
from inferlab import _C, kernels
from inferlab.kernels.reference import layer as reference
from inferlab.kernels.reference.kv import as_numbers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture(params=_C.build_info()["isas"])
def isa(request):
    try:
        _C.force_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    _C.force_isa("auto")


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (actual.double() - expected.double()).abs().max()
    assert error <= TOLERANCE[dtype] * max(1.0, float(expected.abs().max())), float(error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 19, 64, 111, 160, 1024])
def test_rms_norm(isa, dim, dtype):
    x, weight = random(3, 5, dim, dtype=dtype), random(dim, dtype=dtype, seed=1)
    expected = reference.rms_norm(x, weight, 1e-5)
    assert_close(kernels.rms_norm(x, weight, 1e-5), expected, dtype)
    shifted = reference.rms_norm(x, weight, 1e-5, offset=1.0)
    assert_close(kernels.rms_norm(x, weight, 1e-5, offset=1.0), shifted, dtype)
    torch_own = torch.nn.functional.rms_norm(x.float(), (dim,), weight.float(), 1e-5)
    assert_close(expected, torch_own, dtype)


def test_rms_norm_reads_rows_that_are_apart(isa):
    wide = random(7, 96, dtype=torch.float32)
    weight = random(40, dtype=torch.float32, seed=1)
    x = wide[:, 8:48]
    expected = reference.rms_norm(x, weight)
    assert_close(kernels.rms_norm(x, weight), expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 7, 16, 111, 448])
def test_silu_mul(isa, dim, dtype):
    x = 4 * random(5, 2 * dim, dtype=dtype)
    assert_close(kernels.silu_mul(x), reference.silu_mul(x.float()), dtype)


def test_silu_mul_far_out_is_zero_or_the_gate(isa):
    gate = torch.tensor([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4] * 6)
    out = kernels.silu_mul(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    assert torch.equal(out[gate > 0], gate[gate > 0])
    assert (out[gate < 0].abs() < 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 33, 19), (5, 160, 224), (8, 100, 67), (13, 48, 4)])
def test_linear(isa, size, dtype):
    rows, inputs, outputs = size
    x, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype, seed=1)
    bias, residual = (
        random(outputs, dtype=dtype, seed=2),
        random(rows, outputs, dtype=dtype, seed=3),
    )
    product = x.double() @ weight.double().T
    assert_close(kernels.linear(x, weight), product, dtype)
    assert_close(kernels.linear(x, weight, bias), product + bias.double(), dtype)
    both = kernels.linear(x, weight, bias, residual)
    assert_close(both, product + bias.double() + residual.double(), dtype)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_linear_of_any_shape(data):
    """Partial tiles on every side, rows that are apart, NaN wherever nothing may be read."""
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, outputs = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    inputs, apart = data.draw(st.integers(1, 130)), data.draw(st.integers(0, 3))
    wide = random(rows, inputs + apart, dtype=dtype)
    wide[:, inputs:] = float("nan")
    behind = torch.full((outputs + 17, inputs), float("nan"), dtype=dtype)
    x, weight = wide[:, :inputs], behind[:outputs]
    weight.copy_(random(outputs, inputs, dtype=dtype, seed=1))
    bias = random(outputs, dtype=dtype, seed=2) if data.draw(st.booleans()) else None
    residual = random(rows, outputs, dtype=dtype, seed=3) if data.draw(st.booleans()) else None
    exact = x.double() @ weight.double().T
    if bias is not None:
        exact += bias.double()
    if residual is not None:
        exact += residual.double()
    for isa in ISAS:
        _C.force_isa(isa)
        try:
            assert_close(kernels.linear(x, weight, bias, residual), exact, dtype)
        finally:
            _C.force_isa("auto")


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rounds_the_product_before_it_adds_the_residual(isa, dtype):
    x, weight = torch.ones(20, 2, dtype=dtype), torch.ones(24, 2, dtype=dtype)
    weight[:, 1] = torch.finfo(dtype).eps / 4  # lost when the product is rounded
    weight[8] = float("nan")
    residual = torch.full((20, 24), -1.0, dtype=dtype)
    out = kernels.linear(x, weight, None, residual)
    assert out[:, 8].isnan().all()
    assert (out[:, :8] == 0).all()
    assert (out[:, 9:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [160, 147])
def test_linear_of_a_row_does_not_depend_on_the_rows_beside_it_or_on_threads(isa, inputs, dtype):
    most = 70
    x, weight = random(most, inputs, dtype=dtype), random(483, inputs, dtype=dtype, seed=1)
    x[::7] *= 1e4
    alone = torch.cat([kernels.linear(x[i : i + 1], weight) for i in range(most)])
    for rows in range(1, most + 1):
        assert torch.equal(kernels.linear(x[:rows], weight), alone[:rows])
        assert torch.equal(kernels.linear(x[-rows:], weight), alone[-rows:])
    many = kernels.linear(x.repeat(4, 1), weight)
    assert torch.equal(many, alone.repeat(4, 1))
    _C.set_num_threads(1)
    try:
        assert torch.equal(kernels.linear(x, weight), alone)
    finally:
        _C.set_num_threads(0)


def pages_for(batch: int, heads: int, dim: int, dtype: torch.dtype):
    k_pages = torch.full((11, 4, heads, dim), float("nan"), dtype=dtype)
    table = torch.tensor([[3, 7, 0, 9], [10, 2, 5, 1]], dtype=torch.int32)[:batch]
    return k_pages, k_pages.clone(), table


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (64, 16), (40, 40), (80, 24)])
@pytest.mark.parametrize("ragged", [False, True])
def test_rope_append(isa, dim, rotary, ragged, dtype):
    batch, nodes, q_heads, kv_heads = 2, 5, 6, 2
    qkv = random(batch, nodes, q_heads + 2 * kv_heads, dim, dtype=dtype)
    angles = random(batch, nodes, rotary, dtype=torch.float32, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    seq_lens = torch.tensor([6, 2], dtype=torch.int32)
    num_nodes = torch.tensor([5, 3], dtype=torch.int32) if ragged else None
    outcomes = []
    for rope_append in (kernels.rope_append, reference.rope_append):
        copy = qkv.clone()
        q, k, v = copy.split([q_heads, kv_heads, kv_heads], dim=2)
        k_pages, v_pages, table = pages_for(batch, kv_heads, dim, dtype)
        rope_append(
            q, k, v, cos, sin, k_pages, v_pages, table, seq_lens, node_offset=1,
            num_nodes=num_nodes,
        )  # fmt: skip
        outcomes.append((copy, k_pages, v_pages))
    (copy, k_pages, v_pages), expected = outcomes
    assert_close(copy, expected[0], dtype)
    assert torch.equal(k_pages.isnan(), expected[1].isnan())
    assert_close(k_pages.nan_to_num(), expected[1].nan_to_num(), dtype)
    assert torch.equal(v_pages.nan_to_num(), expected[2].nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", list(BITS_8))
def test_rope_append_rounds_to_8_bits(isa, stored, dtype):
    qkv = random(2, 5, 10, 40, dtype=dtype)
    angles = random(2, 5, 24, dtype=torch.float32, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    seq_lens = torch.tensor([6, 2], dtype=torch.int32)
    blank, _, table = pages_for(2, 2, 40, dtype)
    outcomes = []
    for rope_append in (kernels.rope_append, reference.rope_append):
        q, k, v = qkv.clone().split([6, 2, 2], dim=2)
        k_pages, v_pages = pages_of(blank, stored), pages_of(blank, stored)
        rope_append(q, k, v, cos, sin, k_pages, v_pages, table, seq_lens)
        outcomes.append((q, as_numbers(k_pages), as_numbers(v_pages)))
    (q, k, v), (wanted_q, wanted_k, wanted_v) = outcomes
    assert_close(q, wanted_q, dtype)
    torch.testing.assert_close(v, wanted_v, rtol=0, atol=0, equal_nan=True)
    # Where the angles' products are rounded otherwise, a number may come to the next code.
    next_code = {"rtol": 0, "atol": 0.04} if stored == "int8" else {"rtol": 0.13, "atol": 2**-9}
    torch.testing.assert_close(k, wanted_k, equal_nan=True, **next_code)
    assert (k == wanted_k).sum() > 0.9 * wanted_k.isfinite().sum()


def test_numpy_arrays_work():
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    weight = np.ones((4, 32), np.float32)
    np.testing.assert_allclose(kernels.linear(x, weight), x @ weight.T, rtol=1e-5)
    assert isinstance(kernels.silu_mul(x), np.ndarray)
    assert kernels.rms_norm(x, weight[0]).shape == (3, 32)


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.linear(X, torch.zeros(3, 9)), ValueError, "x has shape"),
        (lambda: kernels.linear(X, torch.zeros(3, 8).half()), TypeError, "x has dtype float32"),
        (lambda: kernels.linear(X, torch.zeros(3, 8), torch.zeros(4)), ValueError, "bias"),
        (lambda: kernels.rms_norm(X, torch.zeros(9)), ValueError, "weight has shape"),
        (lambda: kernels.rms_norm(X, torch.zeros(8), -1.0), ValueError, "eps is -1"),
        (lambda: kernels.silu_mul(torch.zeros(2, 7)), ValueError, "last dimension must be twice"),
        (lambda: kernels.silu_mul(torch.zeros(2, 8).int()), TypeError, "x|out"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_rope_append_needs_angles():
    q, pages, none = torch.zeros(1, 2, 1, 8), torch.zeros(2, 4, 1, 8), torch.zeros(1, 2, 0)
    table, lens = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="cos has 0 channels; it must be even, above 0"):
        kernels.rope_append(q, q, q, none, none, pages, pages, table, lens)


def test_rope_append_never_writes_outside_the_pages():
    q, k = torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 1, 8)
    cos = torch.zeros(1, 3, 8)
    k_pages, v_pages = torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 8)
    for table, length in (([[5]], 0), ([[0]], 2), ([[-1]], 0), ([[0, 1]], -1)):
        with pytest.raises(ValueError, match=r"block_table|seq_lens"):
            kernels.rope_append(
                q, k, k, cos, cos, k_pages, v_pages,
                torch.tensor(table, dtype=torch.int32), torch.tensor([length], dtype=torch.int32),
            )  # fmt: skip


def test_torch_compile_takes_the_ops_whole():
    weight, norm = random(24, 16, dtype=torch.float32), torch.ones(16)

    def f(x):
        return kernels.silu_mul(kernels.linear(kernels.rms_norm(x, norm), weight))

    x = random(3, 16, dtype=torch.float32)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), f(x))
