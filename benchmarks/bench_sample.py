"""sample: rows of logits to tokens, one each, and several siblings each as a tree is drafted."""

from typing import Any

import pytest
import torch

import floors
import peers
import torch_sampling
from inferlab.kernels import SamplingTensors, sample
from inputs import language_logits
from shapes import DTYPES, grid, shapes

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.8},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-k+top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    "shape",
    shapes(
        grid(B=[1, 8], V=[4096, 151_936], dtype=["bf16"]),
        sweep=grid(B=[1, 8, 64], V=[32_000, 128_256, 262_144], dtype=["f32", "bf16"]),
    ),
)
def bench_sample(kernel_bench: Any, device: Any, setting: str, shape: dict[str, Any]) -> None:
    batch, vocab, dtype = shape["B"], shape["V"], DTYPES[shape["dtype"]]
    options = SETTINGS[setting]
    sampling = SamplingTensors.of(batch, **options, device=device.torch)
    positions = torch.full((batch,), 100, device=device.torch)
    num_bytes = floors.sample(batch, vocab, dtype.itemsize)
    kernel_bench(
        "sample",
        setting,
        shape,
        lambda logits: sample(logits, positions, sampling),
        device.cases(lambda: language_logits(device, batch, vocab, dtype=dtype), num_bytes),
        num_bytes=num_bytes,
        bound="read",
        torch_fn=lambda logits: torch_sampling.sample(logits, **options),
        peers=lambda: peers.sample(device.torch, options),
    )


@pytest.mark.parametrize(
    "shape",
    shapes(
        grid(B=[1], N=[8], V=[4096, 151_936], siblings=[4], dtype=["bf16"]),
        sweep=grid(B=[1, 32], N=[1, 8], V=[32_000, 151_936], siblings=[2, 8], dtype=["bf16"]),
    ),
)
def bench_draft_siblings(kernel_bench: Any, device: Any, shape: dict[str, Any]) -> None:
    batch, nodes, vocab, count = (shape[k] for k in ("B", "N", "V", "siblings"))
    dtype = DTYPES[shape["dtype"]]
    sampling = SamplingTensors.of(batch, temperature=0.8, device=device.torch)
    positions = torch.full((batch, nodes), 100, device=device.torch)
    num_bytes = floors.sample(batch * nodes, vocab, dtype.itemsize, count)
    kernel_bench(
        "sample",
        "several of each",
        shape,
        lambda logits: sample(logits, positions, sampling, num_samples=count),
        device.cases(lambda: language_logits(device, batch, nodes, vocab, dtype=dtype), num_bytes),
        num_bytes=num_bytes,
        bound="read",
        torch_fn=lambda logits: torch_sampling.sample(logits.flatten(0, 1), 0.8, count=count),
    )
