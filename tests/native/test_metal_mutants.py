"""The tests of Metal's kernels can fail: deliberately broken copies are caught."""

import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from helpers import kv_cases, metal_shim, sampling_cases, shim_build
from helpers.backends import Backend
from inferlab import kernels
from inferlab.kernels import SamplingTensors, reference

pytestmark = pytest.mark.skipif(
    shutil.which(shim_build.COMPILER) is None, reason=f"no {shim_build.COMPILER}"
)


def attention_is_right(backend, **options):
    case = kv_cases.attention_case(3, [40, 9, 300], 9, group=3, **options)

    def run(op):
        return case.run(op).double()

    ours = run(lambda *a, **k: backend.call(kernels.paged_tree_attention, *a, **k))
    return torch.allclose(ours, run(reference.paged_tree_attention), atol=2e-5, rtol=0)


def compaction_is_right(backend):
    k, v = (torch.randn(2, 6, 4, 2, 64) for _ in range(2))
    table = torch.tensor([[3, 1, 5], [0, 2, 4]], dtype=torch.int32)
    lens = torch.tensor([3, 2], dtype=torch.int32)
    nodes = torch.tensor([[0, 2, 3, 6], [1, 2, 4, 7]], dtype=torch.int32)
    count = torch.tensor([4, 3], dtype=torch.int32)
    ours = backend.call_in_place(kernels.kv_compact, k, v, table, lens, nodes, count)
    reference.kv_compact(k, v, table, lens, nodes, count)
    return torch.equal(ours[0], k) and torch.equal(ours[1], v)


def sampling_is_right(backend):
    rng = np.random.default_rng(1)
    for kind in ("normal", "ties", "flat", "masked"):
        logits = sampling_cases.random_logits(rng, (2, 3, 900), kind, torch.bfloat16)
        positions = torch.from_numpy(rng.integers(0, 5000, (2, 3)))
        for top_k, top_p in ((40, 0.9), (7, 1.0), (0, 0.513), (0, 1.0)):
            sampling = SamplingTensors.of(
                2,
                temperature=[0.9, 1.7],
                top_k=top_k,
                top_p=top_p,
                seed=[3, -8],
                frequency_penalty=1.5,
                output_tokens=[[1, 1, 5], [7, 2, 2]],
            )
            arguments = (logits, positions, sampling)
            ours = backend.call(kernels.sample, *arguments, num_samples=2)
            if not torch.equal(ours, kernels.sample(*arguments, num_samples=2)):
                return False
    return True


def rejection_is_right(backend):
    """Residuals of two siblings: target (.5, .3, .2), draft (.2, .5, .3), tokens 1, 2 tried."""
    batch = 300
    rows = [torch.tensor(p).log().expand(batch, 3, 3) for p in ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3])]
    tokens = torch.tensor([[0, 1, 2]], dtype=torch.int32).repeat(batch, 1)
    links = kernels.build_tree(torch.tensor([[-1, 0, 0]] * batch, dtype=torch.int32))
    lens = torch.full((batch,), 7, dtype=torch.int32)
    sampling = SamplingTensors.of(batch, temperature=1.0, seed=list(range(batch)))
    arguments = (*rows, tokens, links, lens, sampling)
    ours = backend.call(kernels.verify_tree_rejection, *arguments)
    theirs = kernels.verify_tree_rejection(*arguments)
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class Mutant:
    """A change of one source, and the check that must notice it."""

    name: str
    file: str
    old: str
    new: str
    check: object
    options: tuple = ()

    def is_right(self, backend):
        return self.check(backend, **dict(self.options))


WINDOW = (("window", 7),)
CAUSAL = (("tree", False),)
MUTANTS = [
    Mutant(
        "ancestor bit dropped",
        "paged_tree_attention.metal",
        ">> (j % 64) & 1) != 0",
        ">> (j % 64) & 1) != 0 && j != 3",
        attention_is_right,
    ),
    Mutant(
        "page off by one",
        "pages.h",
        "(slot & (p.page_size - 1))",
        "((slot + 1) & (p.page_size - 1))",
        attention_is_right,
    ),
    Mutant(
        "merged without rescaling",
        "paged_tree_attention.metal",
        "value = fma(shared.acc[i][tid], gain, value);",
        "value += shared.acc[i][tid];",
        attention_is_right,
    ),
    Mutant(
        "window off by one",
        "paged_tree_attention.metal",
        "position - p.window + 1 : 0",
        "position - p.window : 0",
        attention_is_right,
        WINDOW,
    ),
    Mutant(
        "later nodes visible",
        "paged_tree_attention.metal",
        "bool visible = row >= 0 && slot < shared.limit[r];",
        "bool visible = row >= 0;",
        attention_is_right,
        CAUSAL,
    ),
    Mutant(
        "barrier removed before the merge reads",
        "paged_tree_attention.metal",
        "= acc[r][c];\n    group_barrier();",
        "= acc[r][c];",
        attention_is_right,
    ),
    Mutant(
        "compaction downwards",
        "kv_compact.metal",
        "for (long j = 0; j < count; ++j)",
        "for (long j = count - 1; j >= 0; --j)",
        compaction_is_right,
    ),
    Mutant(
        "tie broken to the higher id",
        "../include/inferlab/weights.h",
        "(0xffffffffu - token);",
        "token;",
        sampling_is_right,
    ),
    Mutant(
        "one token too many in top-k and top-p",
        "row.h",
        "(target - at_high + tie - 1) / tie",
        "(target - at_high + tie) / tie",
        sampling_is_right,
    ),
    Mutant(
        "counts not cleared",
        "row.h",
        "t += kThreads) counts[t] = 0;",
        "t += kThreads) counts[t] = t & 1;",
        sampling_is_right,
    ),
    Mutant(
        "residual not updated",
        "verify_tree_rejection.metal",
        "p.values[t] = a > b ? a - b : 0.0f;",
        "p.values[t] = a;",
        rejection_is_right,
    ),
    Mutant(
        "acceptance and token share their noise",
        "verify_tree_rejection.metal",
        "uint(c), kPurposeAccept",
        "uint(c), kPurposeRecovery",
        rejection_is_right,
    ),
]


def backend_of(folder):
    ops = metal_shim.metal_ops(folders=(folder / "metal", folder / "include"))
    return Backend("metal-shim", "cpu", ops)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_broken_kernels_are_caught(mutant, tmp_path):
    assert mutant.is_right(backend_of(shim_build.CSRC))
    for name in ("metal", "include"):
        shutil.copytree(shim_build.CSRC / name, tmp_path / name)
    path = tmp_path / "metal" / mutant.file
    text = path.read_text()
    assert mutant.old in text
    path.write_text(text.replace(mutant.old, mutant.new))
    assert not mutant.is_right(backend_of(tmp_path))
