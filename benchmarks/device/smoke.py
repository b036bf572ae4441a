"""Every op on the device against the CPU's kernels: called plainly, on a side stream behind slow
work, and from a captured graph on new inputs. A line each; the exit status says whether all agreed.

    python benchmarks/device/smoke.py               on the CUDA device
    python benchmarks/device/smoke.py --shim FILE   plainly, by the module that tests/helpers/
                                                    shim_build.py makes of csrc/cuda for the CPU
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from helpers import shim_build
from helpers.sampling_cases import random_parents
from inferlab import kernels
from inferlab.kernels import SamplingTensors, _registry, build_tree

Tensors = dict[str, torch.Tensor]
Op = Callable[[Tensors, SamplingTensors], Sequence[torch.Tensor]]

BATCH, NODES, VOCAB, HEADS, KV_HEADS, DIM, PAGE, PAGES = 3, 21, 32_003, 8, 2, 128, 16, 40
SAMPLING: dict[str, Any] = {
    "temperature": [0.0, 0.8, 1.0],
    "top_k": [0, 50, 0],
    "top_p": 0.9,
    "seed": 3,
}
EXACT, BF16 = 0.0, 2e-2
SLEEP_CYCLES = 20_000_000  # some 10 ms: whoever does not wait for them reads old inputs


def inputs(seed: int) -> Tensors:
    """One step's data on the CPU; shapes are always the same, all else differs by seed."""
    import numpy as np

    g = torch.Generator().manual_seed(seed)

    def below(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=g, dtype=torch.int32)

    def bf16(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).bfloat16()

    parents = random_parents(np.random.default_rng(seed), BATCH, NODES)
    links = build_tree(parents)
    logits = 3 * torch.randn(BATCH, NODES, VOCAB, generator=g)
    tokens = below(VOCAB, BATCH, NODES)
    tokens[:, 1:4] = logits[:, :3].argmax(-1).int()
    accepted = torch.arange(4, dtype=torch.int32).mul(3).repeat(BATCH, 1)
    return {
        "parents": parents,
        **links._asdict(),
        "logits": logits.bfloat16(),
        "draft": (logits + 0.5 * torch.randn(logits.shape, generator=g)).bfloat16(),
        "tokens": tokens,
        "positions": below(1000, BATCH, NODES).long(),
        "seq_lens": below(PAGE * PAGES - NODES, BATCH),
        "table": torch.randperm(BATCH * PAGES, generator=g).int().view(BATCH, PAGES),
        "q": bf16(BATCH, NODES, HEADS, DIM),
        "k": bf16(BATCH, NODES, KV_HEADS, DIM),
        "v": bf16(BATCH, NODES, KV_HEADS, DIM),
        "cos": bf16(BATCH, NODES, DIM),
        "sin": bf16(BATCH, NODES, DIM),
        "k_cache": bf16(2, BATCH * PAGES, PAGE, KV_HEADS, DIM),
        "v_cache": bf16(2, BATCH * PAGES, PAGE, KV_HEADS, DIM),
        "accepted": accepted,
        "num_accepted": below(5, BATCH),
        "pages_from": torch.tensor([1, 5, 9], dtype=torch.int32),
        "pages_to": torch.tensor([2, 3, 4], dtype=torch.int32),
        "x": bf16(BATCH, 4096),
        "weight": bf16(4096),
        "matrix": bf16(72, 4096) / 64,
        "sum": bf16(BATCH, 72),
    }


def links_of(x: Tensors) -> kernels.TreeLinks:
    return kernels.TreeLinks(*(x[name] for name in kernels.TreeLinks._fields))


def attention(nodes: int, dtype: torch.dtype, tree: bool) -> Op:
    def op(x: Tensors, _: SamplingTensors) -> list[torch.Tensor]:
        q, k, v = (x[name].to(dtype) for name in ("q", "k_cache", "v_cache"))
        ancestors = x["ancestors"][:, :nodes].contiguous() if tree else None
        return [
            kernels.paged_tree_attention(
                q[:, :nodes], k[0], v[0], x["table"], x["seq_lens"], ancestors, scale=DIM**-0.5
            )
        ]

    return op


def append(x: Tensors) -> list[torch.Tensor]:
    pages = x["k_cache"][0], x["v_cache"][0]
    kernels.kv_append(x["k"], x["v"], *pages, x["table"], x["seq_lens"])
    return list(pages)


def compact(x: Tensors) -> list[torch.Tensor]:
    caches = x["k_cache"], x["v_cache"]
    kernels.kv_compact(*caches, x["table"], x["seq_lens"], x["accepted"], x["num_accepted"])
    return list(caches)


def copy_pages(x: Tensors) -> list[torch.Tensor]:
    kernels.kv_copy_pages(x["k_cache"], x["v_cache"], x["pages_from"], x["pages_to"])
    return [x["k_cache"], x["v_cache"]]


def rope(x: Tensors) -> list[torch.Tensor]:
    q, pages = x["q"], (x["k_cache"][0], x["v_cache"][0])
    kernels.rope_append(q, x["k"], x["v"], x["cos"], x["sin"], *pages, x["table"], x["seq_lens"])
    return [q, *pages]


OPS: dict[str, tuple[float, Op]] = {
    "build_tree": (EXACT, lambda x, _: build_tree(x["parents"])),
    "kv_append": (EXACT, lambda x, _: append(x)),
    "kv_compact": (EXACT, lambda x, _: compact(x)),
    "kv_gather": (
        EXACT,
        lambda x, _: [kernels.kv_gather(x["k_cache"][0], x["table"], x["seq_lens"], PAGE * PAGES)],
    ),
    "kv_copy_pages": (EXACT, lambda x, _: copy_pages(x)),
    **{
        f"attention {name}, {nodes} nodes": (
            tolerance,
            attention(nodes, dtype, tree),
        )
        for name, dtype, tolerance in (
            ("bf16", torch.bfloat16, BF16),
            ("f16", torch.float16, 4e-3),
            ("f32", torch.float32, 1e-5),
        )
        for nodes, tree in ((1, False), (NODES, True))
    },
    "sample": (EXACT, lambda x, s: [kernels.sample(x["logits"], x["positions"], s)]),
    "verify_tree_match": (
        EXACT,
        lambda x, s: kernels.verify_tree_match(
            x["logits"], x["tokens"], links_of(x), x["seq_lens"], s
        ),
    ),
    "verify_tree_rejection": (
        EXACT,
        lambda x, s: kernels.verify_tree_rejection(
            x["logits"], x["draft"], x["tokens"], links_of(x), x["seq_lens"], s
        ),
    ),
    "verify_tree_lossy": (
        EXACT,
        lambda x, s: kernels.verify_tree_lossy(
            x["logits"], x["tokens"], links_of(x), x["seq_lens"], s, "typical", 0.5
        ),
    ),
    "linear": (
        BF16,
        lambda x, _: [kernels.linear(x["x"], x["matrix"], None, x["sum"], constant_weight=False)],
    ),
    "rms_norm": (BF16, lambda x, _: [kernels.rms_norm(x["x"], x["weight"])]),
    "silu_mul": (BF16, lambda x, _: [kernels.silu_mul(x["x"])]),
    "rope_append": (BF16, lambda x, _: rope(x)),
}


def difference(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor], tolerance: float) -> str:
    """What is wrong; empty if nothing is."""
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        a = a.cpu()
        if tolerance == EXACT:
            if not torch.equal(a, b):
                return f"result {i}: {int((a != b).sum())} of {a.numel()} differ"
            continue
        far = (a.float() - b.float()).abs() > tolerance * (1 + b.float().abs())
        if bool(far.any()) or not bool(a.isfinite().all()):
            worst = float((a.float() - b.float()).abs().max())
            return f"result {i}: {int(far.sum())} of {a.numel()} differ, by up to {worst:.3g}"
    return ""


def on_cuda(op: Op, sampling: SamplingTensors) -> dict[str, list[torch.Tensor]]:
    """The results of inputs(1), inputs(2) and inputs(3), in three ways."""
    held = {name: value.cuda() for name, value in inputs(1).items()}
    settings = sampling.to("cuda")
    found = {"plain": [t.clone() for t in op(held, settings)]}

    side = torch.cuda.Stream()
    fresh = {name: value.cuda() for name, value in inputs(2).items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        for name, value in fresh.items():
            held[name].copy_(value)
        results = [t.clone() for t in op(held, settings)]
    side.synchronize()
    found["side stream"] = results

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(held, settings)
    for name, value in inputs(3).items():
        held[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    found["graph"] = list(captured)
    return found


def check(name: str, shim: Any) -> bool:
    tolerance, op = OPS[name]
    sampling = SamplingTensors.of(BATCH, **SAMPLING)
    ways = ("plain",) if shim is not None else ("plain", "side stream", "graph")
    want = {way: op(inputs(i + 1), sampling) for i, way in enumerate(ways)}
    if shim is not None:
        cpu, _registry.BACKENDS["cpu"] = _registry.BACKENDS["cpu"], shim
        try:
            found = {"plain": list(op(inputs(1), sampling))}
        finally:
            _registry.BACKENDS["cpu"] = cpu
    else:
        found = on_cuda(op, sampling)
    wrong = {way: difference(found[way], want[way], tolerance) for way in ways}
    verdict = "; ".join(f"{way}: {w}" for way, w in wrong.items() if w) or "ok"
    print(f"{name:28} {verdict}", flush=True)
    return verdict == "ok"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shim", type=Path, metavar="FILE", help="a module of shim_build.build()")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--failed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    shim = shim_build.load(args.shim) if args.shim else None
    if shim is None and "cuda" not in _registry.BACKENDS:
        parser.error("inferlab is built without CUDA")
    failed, names = args.failed, list(OPS)
    for index, name in enumerate(names[args.first :], start=args.first):
        try:
            failed += not check(name, shim)
        except Exception as error:
            print(f"{name:28} {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            failed += 1
            if shim is None:  # a fault on the device spoils the process
                rest = ["--first", str(index + 1), "--failed", str(failed)]
                os.execv(sys.executable, [sys.executable, __file__, *rest])
    print(f"{len(names) - failed} of {len(names)} ops agree with the CPU")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
