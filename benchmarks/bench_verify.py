"""verify_tree_*: a tree of 64 nodes, a batch of chains; bytes are those of the rows visited."""

import pytest
import torch

import torch_sampling
from bench_sample import language_logits
from inferlab.kernels import (
    SamplingTensors,
    build_tree,
    sample,
    verify_tree_lossy,
    verify_tree_match,
    verify_tree_rejection,
)

SHAPES = {
    "tree of 64": (1, [-1] + [(n - 1) // 2 for n in range(1, 64)]),
    "8 chains of 5": (8, [-1, 0, 1, 2, 3]),
}
SETTINGS = {
    "greedy": {"temperature": 0.0},
    "plain": {"temperature": 0.8},
    "top-k+top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
}


class Case:
    """Trees whose walks go on for a few nodes: most first children hold the target's choice."""

    def __init__(self, shape, vocab, options, rotate):
        self.batch, parents = SHAPES[shape]
        nodes = len(parents)
        self.links = build_tree(torch.tensor([parents] * self.batch, dtype=torch.int32))
        self.options = options
        self.sampling = SamplingTensors.of(self.batch, seed=list(range(self.batch)), **options)
        self.lens = torch.full((self.batch,), 100, dtype=torch.int32)
        positions = self.lens.long().unsqueeze(1) + self.links.depth + 1
        self.children = [[[c for c in range(nodes) if parents[c] == n] for n in range(nodes)]]
        self.children *= self.batch

        def make():
            logits = language_logits(self.batch, nodes, vocab)
            draft = (logits.float() + 0.3 * torch.randn(logits.shape)).bfloat16()
            chosen = sample(logits, positions, self.sampling)[..., 0]
            tokens = torch.randint(0, vocab, (self.batch, nodes), dtype=torch.int32)
            for n, below in enumerate(self.children[0]):
                if below and n % 8 != 7:
                    tokens[:, below[0]] = chosen[:, n]
            return logits, draft, tokens

        self.take = rotate(make, self.batch * nodes * vocab * 4)
        visited = [verify_tree_match(*self.match(self.take())).num_accepted for _ in range(3)]
        self.rows = int(sum(int(v.sum()) for v in visited) / 3)
        self.bytes = self.rows * vocab * 2

    def match(self, case):
        return case[0], case[2], self.links, self.lens, self.sampling

    def name(self, op, setting, shape, vocab):
        return f"{op} {setting}, {shape}, V={vocab}: {self.rows} rows"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab", [4096, 151_936])
def bench_match(kernel_bench, rotate, setting, shape, vocab):
    case = Case(shape, vocab, SETTINGS[setting], rotate)

    def torch_walk():
        logits, _, tokens = case.take()
        return torch_sampling.verify_match(logits, tokens.tolist(), case.children, **case.options)

    kernel_bench(
        case.name("match", setting, shape, vocab),
        lambda: verify_tree_match(*case.match(case.take())),
        num_bytes=case.bytes,
        torch_fn=torch_walk,
    )


@pytest.mark.parametrize("setting", ["plain", "top-k+top-p"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("vocab", [4096, 151_936])
def bench_rejection(kernel_bench, rotate, setting, shape, vocab):
    case = Case(shape, vocab, SETTINGS[setting], rotate)

    def native():
        logits, draft, tokens = case.take()
        return verify_tree_rejection(logits, draft, tokens, case.links, case.lens, case.sampling)

    def torch_walk():
        logits, draft, tokens = case.take()
        return torch_sampling.verify_rejection(
            logits, draft, tokens.tolist(), case.children, **case.options
        )

    kernel_bench(
        case.name("rejection", setting, shape, vocab),
        native,
        num_bytes=2 * case.bytes,
        torch_fn=torch_walk,
    )


@pytest.mark.parametrize("rule", [("conf_threshold", 0.2), ("topk_agree", 5), ("typical", 0.5)])
@pytest.mark.parametrize("vocab", [4096, 151_936])
def bench_lossy(kernel_bench, rotate, rule, vocab):
    shape = "tree of 64"
    case = Case(shape, vocab, SETTINGS["plain"], rotate)

    def native():
        logits, _, tokens = case.take()
        return verify_tree_lossy(logits, tokens, case.links, case.lens, case.sampling, *rule)

    def torch_walk():
        logits, _, tokens = case.take()
        return torch_sampling.verify_lossy(logits, tokens.tolist(), case.children, *rule, 0.8)

    kernel_bench(
        case.name(rule[0], "plain", shape, vocab),
        native,
        num_bytes=case.bytes,
        torch_fn=torch_walk,
    )
