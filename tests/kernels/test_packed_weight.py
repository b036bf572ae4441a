"""Weights of 8 and 4 bits: how they are packed, and products with them on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.isas import ISAS
from inferlab import _C, kernels
from inferlab.kernels import pack, unpack
from inferlab.kernels.fallback.layer import packed_linear as by_torch
from inferlab.kernels.packed_weight import _rounded, _scales, lay_out

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_definition(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    bits: int,
    group: int,
):
    """y[m, n], number by number, in float64 from inputs that are rounded as floats are."""
    rows, inputs = x.shape
    y = torch.zeros(rows, len(q), dtype=torch.float64)
    for m in range(rows):
        for g, start in enumerate(range(0, inputs, group)):
            part = x[m, start : start + group].numpy().astype(np.float32)
            most = np.abs(part).max()
            inverse = np.float32(127.0) / most if most > 0 else np.float32(0)
            rounded = np.rint(part * inverse).astype(np.int64)
            for n in range(len(q)):
                place = n, 0 if bits == 8 else g
                whole = (q[n, start : start + group].numpy() - int(zeros[place])) * rounded
                scale = scales[place]
                y[m, n] += float(scale) * float(most / np.float32(127)) * int(whole.sum())
    return y


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_products_are_what_is_written_down(data):
    bits, group = data.draw(st.sampled_from((8, 4))), data.draw(st.sampled_from((32, 64, 128)))
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, outputs = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 40))
    inputs, apart = data.draw(st.integers(1, 150)), data.draw(st.integers(0, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    tiles, groups = -(-outputs // 16), -(-inputs // group)
    q = torch.from_numpy(rng.integers(0, 2**bits, (16 * tiles, groups * group)))
    scales = torch.from_numpy(rng.normal(size=(16 * tiles, 1 if bits == 8 else groups)) / 50)
    zeros = torch.full(scales.shape, 2 ** (bits - 1))
    told = bits == 4 and data.draw(st.booleans())
    if told:
        scales, zeros = scales.half(), torch.from_numpy(rng.integers(0, 256, scales.shape))
    else:
        scales = scales.bfloat16()
    tiles_of = lay_out(q, scales, bits, zeros if told else None)
    order = torch.from_numpy(rng.permutation(inputs)).int() if data.draw(st.booleans()) else None
    packed = kernels.PackedWeight(tiles_of, bits, group, outputs, inputs, told, order)
    wide = random(rows, inputs + apart, dtype=dtype)
    wide[:, inputs:] = float("nan")
    x = wide[:, :inputs]
    x[0, : inputs // 2] = 0  # whole groups of nothing
    ordered = x if order is None else x[:, order.long()]
    expected = by_definition(
        ordered.float(),
        q[:outputs, :inputs],
        scales[:outputs].float(),
        zeros[:outputs],
        bits,
        group,
    )
    bias = random(outputs, dtype=dtype, seed=2) if data.draw(st.booleans()) else None
    residual = random(rows, outputs, dtype=dtype, seed=3) if data.draw(st.booleans()) else None
    if bias is not None:
        expected += bias.double()
    if residual is not None:
        expected += residual.double()
    out = [torch.empty(rows, outputs, dtype=dtype)]
    by_torch(x, packed.data, bits, group, told, order, bias, residual, out[0])
    for isa in ISAS:
        _C.force_isa(isa)
        try:
            out.append(kernels.packed_linear(x, packed, bias, residual))
        finally:
            _C.force_isa("auto")
    bound = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    assert (out[0].double() - expected).abs().max() <= 2 * bound
    for own in out[1:]:
        assert (own.double() - expected).abs().max() <= bound
        assert torch.equal(own, out[1])


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32), (4, 128), ("zeros", 32)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_rows_beside_it_or_on_threads(bits, group, dtype):
    most = 40
    if bits == "zeros":
        weight = kernels.pack_rounded(*rounded(483, 160, 4, 160 // group, zeros="any"), 4)
        assert weight.zeros
    else:
        weight = kernels.pack(random(483, 160, seed=1), bits, group)
    x = random(most, 160, dtype=dtype)
    x[::7] *= 1e3
    alone = torch.cat([kernels.packed_linear(x[i : i + 1], weight) for i in range(most)])
    for rows in range(1, most + 1):
        assert torch.equal(kernels.packed_linear(x[:rows], weight), alone[:rows])
        assert torch.equal(kernels.packed_linear(x[-rows:], weight), alone[-rows:])
    _C.set_num_threads(1)
    try:
        assert torch.equal(kernels.packed_linear(x, weight), alone)
    finally:
        _C.set_num_threads(torch.get_num_threads())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_an_input_that_is_no_number_is_nan_and_no_other_is(value):
    x = random(3, 100)
    x[1, 70] = value
    out = kernels.packed_linear(x, kernels.pack(random(20, 100, seed=1), 8, 64))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_at_the_ends_of_their_range(isa, bits):
    _C.force_isa(isa)
    try:
        x = torch.zeros(4, 64)
        x[1:, 3] = torch.tensor([1e-38, 1e-45, 1e36])
        weight = torch.zeros(20, 64)
        weight[:3, 3] = torch.tensor([1e-39, 1e-45, 1.0])
        out = kernels.packed_linear(x, kernels.pack(weight, bits, 32))
        assert (out[:3] == 0).all()
        assert out[3, 2] == pytest.approx(1e36, rel=0.02)
        assert (out[3, 3:] == 0).all()
        large = kernels.unpack(kernels.pack(weight * 3e38, bits, 32))
        assert large[2, 3] == pytest.approx(3e38, rel=0.02)
    finally:
        _C.force_isa("auto")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shape", [(16, 128), (1, 1), (33, 200)])
def test_a_packed_weight_is_near_what_it_was(bits, group, shape):
    weight = random(*shape)
    packed = kernels.pack(weight, bits, group)
    error = (kernels.unpack(packed) - weight).abs()
    if bits == 8:  # half a step, of scales that bf16 may have rounded up by 1 in 128
        most = weight.abs().amax(1, keepdim=True)
        assert (error <= 0.5 * most / 127 * (1 + 1 / 100)).all()
    else:
        spread = torch.nn.functional.pad(weight, (0, -shape[1] % group)).view(shape[0], -1, group)
        most = spread.abs().amax(-1).repeat_interleave(group, 1)[:, : shape[1]]
        assert (error <= 0.3 * most).all()  # what is cut off, at most
        assert error.square().mean() <= (most / 7).square().mean() / 10
    assert packed.data.shape[0] == -(-shape[0] // 16)


def test_a_scale_of_4_bits_leaves_less_error_than_the_largest_element_would():
    weight = random(64, 256)
    weight[:, ::32] *= 4
    packed = kernels.pack(weight, 4, 32)
    groups = weight.view(64, -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scale).round() * scale).view(64, 256)
    best = (kernels.unpack(packed) - weight).square().sum()
    assert best < 0.95 * (plain - weight).square().sum()


def slow_compensated(weight: torch.Tensor, moments: torch.Tensor, bits: int, group: int):
    """GPTQ as it is defined: after each input the rest is the best answer to all errors so far."""
    rest, inputs = weight.double().clone(), weight.shape[1]
    h = moments.double()
    h = h + torch.eye(inputs) * 0.01 * h.diagonal().mean()
    q = torch.zeros_like(rest)
    whole = _scales(weight[:, None], bits)
    for i in range(inputs):
        if i % group == 0:
            scale = whole if bits == 8 else _scales(rest[:, None, i : i + group].float(), bits)
        q[:, i] = _rounded(rest[:, i, None, None].float(), scale, bits)[:, 0, 0]
        q[:, i] *= scale[:, 0].double()
        error = rest[:, i] - q[:, i]
        if i + 1 < inputs:  # argmin of the product's error over what is still free
            rest[:, i + 1 :] += error[:, None] * torch.linalg.solve(
                h[i + 1 :, i + 1 :], h[i + 1 :, i]
            )
    return q


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (4, 32)])
@pytest.mark.parametrize("inputs", [64, 128])
def test_roundings_make_up_for_each_other(bits, group, inputs):
    torch.manual_seed(0)
    weight = torch.randn(24, inputs)
    x = torch.randn(400, inputs) @ torch.randn(inputs, inputs)
    moments = x.T @ x
    packed = unpack(pack(weight, bits, group, moments))
    slow = slow_compensated(weight, moments, bits, group)
    assert (packed.double() - slow).abs().mean() < 0.02 * (slow - weight).abs().mean()

    def error(w):
        return float((x @ (w - weight).T).square().mean())

    assert error(packed) < 0.8 * error(unpack(pack(weight, bits, group)))


def test_inputs_that_were_never_seen_are_rounded_to_nearest():
    weight, moments = torch.randn(16, 40), torch.zeros(40, 40)
    assert torch.equal(pack(weight, 4, 32, moments).data, pack(weight, 4, 32).data)
    for wrong in (torch.zeros(40, 39), torch.full((40, 40), torch.nan)):
        with pytest.raises(ValueError, match=r"moments must be \[40, 40\], of finite numbers"):
            pack(weight, 4, 32, wrong)


def rounded(outputs: int, inputs: int, bits: int, groups: int, zeros: int | str = "middle"):
    """q, zeros and fp16 scales of a weight that is rounded."""
    torch.manual_seed(4)
    q = torch.randint(0, 2**bits, (outputs, inputs))
    told = torch.full((outputs, groups), 2 ** (bits - 1))
    if zeros == "any":
        told = torch.randint(0, 2**bits, (outputs, groups))
    return q, told, (torch.rand(outputs, groups) * 0.02 + 0.001).half()


@pytest.mark.parametrize(
    ("inputs", "groups", "group"),
    [(64, 2, 32), (192, 1, 128), (96, 1, 128), (192, 3, 64), (384, 2, 64), (512, 2, 128)],
)
@pytest.mark.parametrize("zeros", ["any", "middle"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_rounded_already_loses_nothing(inputs, groups, group, zeros, dtype):
    q, told, scales = rounded(33, inputs, 4, groups, zeros)
    scales = scales.to(dtype)  # those of bf16 are fp16's, too, at this size
    packed = kernels.pack_rounded(q, told, scales, 4)
    assert (packed.group, packed.zeros) == (group, zeros == "any" or dtype is torch.float16)
    size = inputs // groups
    wide = scales.float().repeat_interleave(size, 1) * (q - told.repeat_interleave(size, 1))
    assert torch.equal(unpack(packed), wide)
    x = random(5, inputs)
    out = kernels.packed_linear(x, packed)
    assert (out - x @ wide.T).abs().max() < 0.02 * (x @ wide.T).abs().max()


def test_of_8_bits_outputs_have_one_scale():
    q, told, scales = rounded(20, 100, 8, 1)
    scales = scales.bfloat16()
    packed = kernels.pack_rounded(q, told, scales, 8)
    assert (packed.bits, packed.zeros) == (8, False)
    assert torch.equal(unpack(packed), scales.float() * (q - 128))


def test_what_would_lose_something_is_not_packed():
    q, told, scales = rounded(16, 96, 4, 2)
    for changed in (
        (q, told, scales.float() * 1.0001, 4),  # no scales of 16 bits
        (q, told, scales.double() * 1e6, 4),
        (q, told + 300, scales, 4),
        (q, told - 9, scales, 4),
        (q, told, scales, 3),
        (*rounded(16, 96, 8, 1), 8),  # fp16's
        (*rounded(16, 96, 8, 2), 8),
        (*rounded(16, 48, 4, 3), 4),  # groups of 16
        (*rounded(16, 100, 4, 3), 4),
    ):
        assert kernels.pack_rounded(*changed) is None


def test_what_cannot_be_packed_or_multiplied_is_refused():
    x, packed = random(2, 40), kernels.pack(random(20, 40), 8, 32)
    nan = torch.full((2, 2), float("nan"))
    for weight, bits, group, message in (
        (random(2, 2), 5, 32, "bits is 5"),
        (random(2, 2), 4, 16, "group is 16"),
        (random(2), 4, 32, r"weight has shape \[2\]"),
        (random(0, 8), 8, 32, r"weight has shape \[0, 8\]; .* not empty"),
        (torch.ones(2, 2, dtype=torch.int32), 8, 32, "weight has dtype torch.int32"),
        (nan, 4, 32, "NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.pack(weight, bits, group)
    for changed, message in (
        ({"bits": 3}, "bits is 3; it must be 8 or 4"),
        ({"group": 48}, "group is 48; it must be 32, 64 or 128"),
        ({"out_features": 40}, r"weight has shape \[2, .*outputs and 40 inputs it must be \[3, "),
        ({"bits": 4}, "it must be"),
        ({"zeros": True}, "zeros is set with 8 bits"),
        ({"bits": 4, "zeros": True}, r"it must be \[2, "),
        ({"order": torch.full((40,), 40, dtype=torch.int32)}, r"order\[0\] is 40; .* \[0, 40\)"),
        ({"order": torch.zeros(40, dtype=torch.int32)}, r"order\[1\] is 0; .* must be there once"),
        ({"order": torch.zeros(39, dtype=torch.int32)}, "order has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.packed_linear(x, packed._replace(**changed))
    with pytest.raises(ValueError, match="packed for 40 inputs"):
        kernels.packed_linear(random(2, 80), packed)
    with pytest.raises(TypeError, match="dtype"):
        kernels.packed_linear(x.double(), packed)
