"""Which stream an op runs on: the framework's current one, however that is to be found out."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from inferlab import kernels
from inferlab.kernels import _registry

SLEEP_CYCLES = 20_000_000  # some 10 ms


def call(ops):
    """An op on arrays, whose type does not tell a stream."""
    x, weight, out = (np.ones(shape, np.float32) for shape in ((2, 8), 8, (2, 8)))
    ops.rms_norm(x, weight, out, 1e-5, 0.0)
    return out


def test_torch_is_asked_where_the_tensor_does_not_tell(cuda_shim, monkeypatch):
    asked = []

    def current_stream(device):
        asked.append(device)
        return SimpleNamespace(cuda_stream=0xABC)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    np.testing.assert_allclose(call(cuda_shim), 1.0, rtol=1e-4)
    assert asked == [0]
    x, weight = torch.ones(2, 8), torch.ones(8)
    cuda_shim.rms_norm(x, weight, torch.empty(2, 8), 1e-5, 0.0)  # tensors tell it themselves
    told = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert asked == ([0] if told else [0, 0])


def test_the_default_stream_serves_where_torch_has_not_touched_cuda(cuda_shim, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: pytest.fail("asked"))
    np.testing.assert_allclose(call(cuda_shim), 1.0, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and "cuda" in _registry.BACKENDS),
    reason="no CUDA device, or built without CUDA",
)
@pytest.mark.parametrize("constant", [False, True])
def test_an_op_waits_for_its_own_stream_alone(constant):
    """Its input comes late on a side stream while the default one sleeps for longer still."""
    x, weight = torch.zeros(4, 256, device="cuda").bfloat16(), torch.randn(64, 256).bfloat16()
    weight, late = weight.cuda(), torch.randn(4, 256).bfloat16().cuda()
    side = torch.cuda.Stream()

    def run():
        return kernels.linear(
            kernels.rms_norm(x, x.new_ones(256)), weight, constant_weight=constant
        )

    run()  # a kernel's first launch loads it, which waits for all streams
    torch.cuda.synchronize()
    torch.cuda._sleep(10 * SLEEP_CYCLES)
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        x.copy_(late)
        got = run()
    side.synchronize()
    assert not torch.cuda.default_stream().query(), "the op has waited for the default stream"
    torch.cuda.synchronize()
    want = kernels.linear(kernels.rms_norm(late, x.new_ones(256)), weight)
    assert torch.equal(got, want)
