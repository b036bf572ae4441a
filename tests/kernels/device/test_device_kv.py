"""The KV ops on accelerators, against the reference: bit for bit, since they only move memory."""

import pytest
import torch

from inferlab.kernels import kv_copy_pages, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 64])
def test_copy_pages(backend, dtype, dim):
    k, v = (torch.randn(3, 9, 16, 2, dim).to(dtype) for _ in range(2))
    ids = torch.randperm(9).int()
    src, dst = ids[:4], ids[4:8]
    got = backend.call_in_place(kv_copy_pages, k, v, src, dst)
    reference.kv_copy_pages(k, v, src, dst)
    assert torch.equal(got[0], k)
    assert torch.equal(got[1], v)


def test_copy_pages_skips_pages_that_do_not_exist(backend):
    k = torch.randn(2, 4, 16, 2, 8)
    src, dst = (torch.tensor(x, dtype=torch.int32) for x in ([0, 9, -1], [-3, 1, 2]))
    got = backend.call_in_place(kv_copy_pages, k, k.clone(), src, dst)
    assert torch.equal(got[0], k)
