"""sample: rows of logits to tokens, for the bundled model's vocabulary and for a large one."""

import pytest
import torch

import torch_sampling
from inferlab.kernels import SamplingTensors, sample

SETTINGS = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.8},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-k+top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
}


def language_logits(*shape, dtype=torch.bfloat16):
    """Logits spread like a language model's: a wide bulk and a few tokens far above it."""
    logits = torch.randn(*shape) * 2.5
    head = torch.randint(0, shape[-1], (*shape[:-1], 40))
    return logits.scatter_add_(-1, head, torch.rand(head.shape) * 12).to(dtype)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("batch", "vocab"), [(1, 4096), (8, 4096), (1, 151_936), (8, 151_936)])
def bench_sample(kernel_bench, rotate, setting, batch, vocab):
    options = SETTINGS[setting]
    sampling = SamplingTensors.of(batch, **options)
    positions = torch.full((batch,), 100)
    num_bytes = batch * vocab * 2
    take = rotate(lambda: language_logits(batch, vocab), num_bytes)
    kernel_bench(
        f"sample {setting} B={batch} V={vocab} bf16",
        lambda: sample(take(), positions, sampling),
        num_bytes=num_bytes,
        torch_fn=lambda: torch_sampling.sample(take(), **options),
    )


@pytest.mark.parametrize("vocab", [4096, 151_936])
def bench_draft_siblings(kernel_bench, rotate, vocab):
    """Four siblings at each of 8 nodes: how a tree is drafted."""
    sampling = SamplingTensors.of(1, temperature=0.8)
    positions = torch.full((1, 8), 100)
    take = rotate(lambda: language_logits(1, 8, vocab), 16 * vocab)
    kernel_bench(
        f"sample 4 of each, N=8 V={vocab} bf16",
        lambda: sample(take(), positions, sampling, num_samples=4),
        num_bytes=16 * vocab,
        torch_fn=lambda: torch_sampling.sample(take()[0], 0.8, count=4),
    )
