"""verify_tree_match, _rejection and _lossy: a tree of 64 nodes, a batch of chains.

Bytes are those of the rows that the walks visit, averaged over the input sets. Most first children
hold the target's choice, so walks go on for a few nodes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

import floors
import peers
import torch_sampling
from bench_sample import SETTINGS
from inferlab.kernels import (
    SamplingTensors,
    TreeLinks,
    VerifyResult,
    build_tree,
    sample,
    verify_tree_lossy,
    verify_tree_match,
    verify_tree_rejection,
)
from inputs import children_of, language_logits, levels_of, parents_of
from shapes import DTYPES, grid, shapes

VOCABS = [4096, 151_936]
SHAPES = grid(B=[1], N=[64], tree=["binary"], V=VOCABS, dtype=["bf16"]) + grid(
    B=[8], N=[5], tree=["chain"], V=VOCABS, dtype=["bf16"]
)
SWEEP = grid(B=[1, 8], N=[16, 64], tree=["binary"], V=[32_000, 128_256], dtype=["f32", "bf16"])
LOSSY = {"conf_threshold": 0.2, "topk_agree": 5, "typical": 0.5}


class Case(NamedTuple):
    logits: torch.Tensor  # [B, N, V]
    tokens: torch.Tensor  # [B, N]
    draft: torch.Tensor  # [B, N, V]


class Setup:
    """Trees of one shape, sampling parameters, and as many cases as a round takes."""

    def __init__(self, device: Any, shape: dict[str, Any], setting: str, with_draft: bool) -> None:
        self.batch, self.nodes, self.vocab = shape["B"], shape["N"], shape["V"]
        self.dtype, self.options = DTYPES[shape["dtype"]], SETTINGS[setting]
        parents = parents_of(shape["tree"], self.nodes)
        trees = torch.tensor([parents] * self.batch, dtype=torch.int32, device=device.torch)
        self.links = build_tree(trees)
        self.children = children_of(parents).to(device.torch)
        self.levels = levels_of(parents)
        seeds = list(range(self.batch))
        self.sampling = SamplingTensors.of(
            self.batch, seed=seeds, **self.options, device=device.torch
        )
        self.lens = torch.full((self.batch,), 100, dtype=torch.int32, device=device.torch)
        positions = self.lens.long().unsqueeze(1) + self.links.depth + 1
        size = (self.batch, self.nodes)

        def make() -> Case:
            logits = language_logits(device, *size, self.vocab, dtype=self.dtype)
            draft = logits
            if with_draft:
                noise = 0.3 * device.randn(*logits.shape)
                draft = (logits.float() + noise).to(self.dtype)
            tokens = device.randint(self.vocab, *size).int()
            chosen = sample(logits, positions, self.sampling)[..., 0]
            for node, (child, *_) in enumerate(self.children.tolist()):
                if child >= 0 and node % 8 != 7:
                    tokens[:, child] = chosen[:, node]
            return Case(logits, tokens, draft)

        case_bytes = (1 + with_draft) * self.batch * self.nodes * self.vocab * self.dtype.itemsize
        self.cases = device.cases(make, case_bytes)

    @property
    def walk(self) -> tuple[TreeLinks, torch.Tensor, SamplingTensors]:
        return self.links, self.lens, self.sampling

    def rows(self, results: list[VerifyResult], of_draft: bool = False) -> float:
        """Rows that a walk reads: one of the target at each node that it visits; of the draft, one
        at each visited node that has children."""
        total = 0
        for result in results:
            visited = result.accepted_nodes.long()
            real = visited >= 0
            total += int(real.sum())
            if of_draft:
                first = self.links.first_child.gather(1, visited.clamp(min=0))
                total += int((real & (first >= 0)).sum())
        return total / len(results)

    def floor(self, rows: float) -> int:
        return floors.verify(rows, self.vocab, self.dtype.itemsize, self.batch, self.nodes)

    def peers(self, device: Any) -> peers.Peers:
        links = self.links.first_child, self.links.next_sibling
        return peers.verify(device.torch, *links, self.levels, self.options)


@pytest.mark.parametrize("setting", ["greedy", "plain", "top-p", "top-k+top-p"])
@pytest.mark.parametrize("shape", shapes(SHAPES, SWEEP))
def bench_match(kernel_bench: Any, device: Any, setting: str, shape: dict[str, Any]) -> None:
    s = Setup(device, shape, setting, with_draft=False)

    def native(case: Case) -> VerifyResult:
        return verify_tree_match(case.logits, case.tokens, *s.walk)

    rows = s.rows([native(case) for case in s.cases])
    kernel_bench(
        "verify_tree_match",
        setting,
        shape,
        native,
        s.cases,
        num_bytes=s.floor(rows),
        bound="read",
        torch_fn=lambda case: torch_sampling.verify_match(
            case.logits, case.tokens, s.children, s.levels, **s.options
        ),
        peers=lambda: s.peers(device),
        note=f"{rows:g} rows",
    )


@pytest.mark.parametrize("setting", ["plain", "top-k+top-p"])
@pytest.mark.parametrize("shape", shapes(SHAPES, SWEEP))
def bench_rejection(kernel_bench: Any, device: Any, setting: str, shape: dict[str, Any]) -> None:
    s = Setup(device, shape, setting, with_draft=True)

    def native(case: Case) -> VerifyResult:
        return verify_tree_rejection(case.logits, case.draft, case.tokens, *s.walk)

    rows = s.rows([native(case) for case in s.cases], of_draft=True)
    kernel_bench(
        "verify_tree_rejection",
        setting,
        shape,
        native,
        s.cases,
        num_bytes=s.floor(rows),
        bound="read",
        torch_fn=lambda case: torch_sampling.verify_rejection(
            case.logits, case.draft, case.tokens, s.children, s.levels, **s.options
        ),
        note=f"{rows:.1f} rows",
    )


@pytest.mark.parametrize("policy", LOSSY)
@pytest.mark.parametrize("shape", shapes(SHAPES[:2], SWEEP))
def bench_lossy(kernel_bench: Any, device: Any, policy: str, shape: dict[str, Any]) -> None:
    s = Setup(device, shape, "plain", with_draft=False)
    threshold = LOSSY[policy]

    def native(case: Case) -> VerifyResult:
        return verify_tree_lossy(case.logits, case.tokens, *s.walk, policy, threshold)

    rows = s.rows([native(case) for case in s.cases])
    kernel_bench(
        "verify_tree_lossy",
        policy,
        shape,
        native,
        s.cases,
        num_bytes=s.floor(rows),
        bound="read",
        torch_fn=lambda case: torch_sampling.verify_lossy(
            case.logits, case.tokens, s.children, s.levels, policy, threshold, 0.8
        ),
        note=f"{rows:.1f} rows",
    )
