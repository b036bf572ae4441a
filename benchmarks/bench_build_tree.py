"""build_tree: a batch of draft trees, as every speculative step builds it."""

import pytest
import torch

from inferlab.kernels import build_tree, reference


@pytest.mark.parametrize(("batch", "nodes"), [(1, 5), (1, 64), (32, 64), (8, 256)])
def bench_build_tree(kernel_bench, batch, nodes):
    parents = torch.tensor([[-1] + [(n - 1) // 2 for n in range(1, nodes)]] * batch)
    parents = parents.int()
    words = (nodes + 63) // 64
    kernel_bench(
        f"build_tree B={batch} N={nodes}",
        lambda: build_tree(parents),
        num_bytes=batch * nodes * (4 + 3 * 4 + 8 * words),
        torch_fn=lambda: reference.build_tree(parents),
    )
