"""A step's kernels in one CUDA graph: replayed on new inputs, it does what plain calls do."""

import pytest
import torch

from inferlab.kernels import (
    SamplingTensors,
    _registry,
    build_tree,
    kv_append,
    kv_compact,
    paged_tree_attention,
    verify_tree_match,
)

BATCH, NODES, VOCAB, HEADS, DIM, PAGE, PAGES = 3, 6, 4097, 2, 64, 16, 5
SAMPLING = {"temperature": [0.0, 0.8, 1.0], "top_k": [0, 20, 0], "top_p": 0.9, "seed": 3}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and "cuda" in _registry.BACKENDS),
        reason="no CUDA device, or built without CUDA",
    ),
]


def inputs(seed: int) -> dict[str, torch.Tensor]:
    """One step's data, on the CPU; lengths, trees, pages and logits all differ by seed."""
    g = torch.Generator().manual_seed(seed)

    def below(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=g, dtype=torch.int32)

    parents = torch.stack(
        [torch.tensor([-1] + [int(below(n, 1)) for n in range(1, NODES)]) for _ in range(BATCH)]
    )
    logits = torch.randn(BATCH, NODES, VOCAB, generator=g)
    tokens = below(VOCAB, BATCH, NODES)
    tokens[:, 1] = logits[:, 0].argmax(-1)
    rows = (BATCH, NODES, HEADS, DIM)
    pool = (1, BATCH * PAGES, PAGE, HEADS, DIM)
    return {
        "parents": parents.int(),
        "tokens": tokens,
        "logits": logits,
        "seq_lens": below(PAGE * PAGES - NODES, BATCH),
        "table": torch.randperm(BATCH * PAGES, generator=g).int().view(BATCH, PAGES),
        "q": torch.randn(rows, generator=g).bfloat16(),
        "k": torch.randn(rows, generator=g).bfloat16(),
        "v": torch.randn(rows, generator=g).bfloat16(),
        "k_cache": torch.randn(pool, generator=g).bfloat16(),
        "v_cache": torch.randn(pool, generator=g).bfloat16(),
    }


def step(x: dict[str, torch.Tensor], sampling: SamplingTensors) -> list[torch.Tensor]:
    """Tree, append, attention, verification, compaction: what a step does between the products."""
    links = build_tree(x["parents"])
    k_pages, v_pages = x["k_cache"][0], x["v_cache"][0]
    kv_append(x["k"], x["v"], k_pages, v_pages, x["table"], x["seq_lens"])
    attended = paged_tree_attention(
        x["q"], k_pages, v_pages, x["table"], x["seq_lens"], links.ancestors, scale=DIM**-0.5
    )
    walk = verify_tree_match(x["logits"], x["tokens"], links, x["seq_lens"], sampling)
    kv_compact(
        x["k_cache"],
        x["v_cache"],
        x["table"],
        x["seq_lens"],
        walk.accepted_nodes,
        walk.num_accepted,
    )
    return [*links, attended, *walk, x["k_cache"], x["v_cache"]]


def test_a_captured_step_can_be_replayed():
    sampling = SamplingTensors.of(BATCH, **SAMPLING)
    held = {name: value.cuda() for name, value in inputs(0).items()}
    on_device = sampling.to("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(held, on_device)  # nothing is loaded for the first time inside the capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(held, on_device)
    for seed in (1, 2, 3):
        fresh = inputs(seed)
        for name, value in fresh.items():
            held[name].copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        expected = step(fresh, sampling)
        for i, (got, want) in enumerate(zip(results, expected, strict=True)):
            if i == 4:
                torch.testing.assert_close(got.cpu().float(), want.float(), atol=2e-2, rtol=2e-2)
            else:
                assert torch.equal(got.cpu(), want), i
