"""What all ops have in common: one description, of which the schema, the checks and Metal's launch
are made (csrc/bindings/op.h)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from inferlab import _C, kernels
from inferlab.kernels import SamplingTensors, _registry, build_tree, sample
from inferlab.kernels.metal import MetalOps

X = torch.randn(1, 3, 2, 8)
POOL = torch.zeros(4, 4, 2, 8)
APPEND = (X, X, POOL, POOL, torch.tensor([[0, 1]], dtype=torch.int32), torch.zeros(1).int(), 0)


def launches(*args, op="kv_append"):
    """What the op would launch on Metal."""
    seen = []
    getattr(_C.metal, op)(lambda *a, **k: seen.append((a, k)), *args)
    return seen


@pytest.mark.parametrize("name", _C.OPS)
def test_an_op_is_the_same_everywhere(name):
    schema, written = _C.OPS[name]
    arguments = getattr(torch.ops.inferlab, name).default._schema.arguments
    assert schema.startswith(f"{name}(")
    marked = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    assert list(written) == [i for i in marked if arguments[i].name != "workspace"]
    assert written, "nothing comes of it"
    for ops in (_C, _C.metal, MetalOps(), _registry.FALLBACK):
        assert callable(getattr(ops, name))
    for given in (0, len(arguments) + 1):
        message = f"{name} was given {given} arguments; it takes {len(arguments)}"
        with pytest.raises(TypeError, match=message):
            getattr(_C, name)(*[None] * given)


@pytest.mark.parametrize("folder", [".", "device"])
@pytest.mark.parametrize("name", _C.OPS)
def test_an_op_is_tested_on_the_cpu_and_on_the_other_backends(name, folder):
    if folder == "device" and (name.startswith("grow_") or name == "packed_linear"):
        pytest.skip("no device has a kernel of it; its torch operations are tested on the CPU")
    files = (Path(__file__).parent / folder).glob("test_*.py")
    texts = [file.read_text() for file in files if file.name != Path(__file__).name]
    assert any(re.search(rf"\b{name}\b", text) for text in texts)


def test_a_launch_on_metal_has_the_tensors_in_order_and_the_parameters():
    ((source, buffers, grid), options), *rest = launches(*APPEND, None)
    assert not rest
    assert (source, grid) == ("kv_append", (3, 1, 2))
    assert options == {"threads": 256, "kernel": "kv_append", "WORD": 16}
    for buffer, tensor in zip(buffers, APPEND[:6], strict=False):
        assert buffer is tensor
    assert buffers[6] is X  # stands in for num_nodes
    assert len(buffers) == 8
    assert buffers[7][-2] == 32  # head_bytes, in front of the two types, which are one word


def test_metal_reads_tensors_of_any_device_by_their_attributes():
    """As on MPS, whose memory has no address here."""
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in APPEND]
    ((_, buffers, _), _), *_ = launches(*meta, None)
    ((_, same, _), _), *_ = launches(*APPEND, None)
    assert buffers[-1] == same[-1]
    with pytest.raises(ValueError, match="v must be on meta, like the other arguments"):
        launches(meta[0], X, *meta[2:], None)
    with pytest.raises(TypeError, match=r"v must be a tensor of torch, not numpy\.ndarray"):
        launches(X, X.numpy(), *APPEND[2:], None)
    skewed = torch.zeros(X.numel() + 1)[1:].view(X.shape)
    ((_, _, _), options), *_ = launches(skewed, *APPEND[1:], None)
    assert options["WORD"] == 2


def test_scalars_of_another_kind_are_named():
    with pytest.raises(TypeError, match="node_offset is a float; it must be an integer"):
        _C.kv_append(*APPEND[:6], 0.5, None)
    with pytest.raises(TypeError, match="eps is a str; it must be a number"):
        _C.rms_norm(X, X[0, 0, 0], X.clone(), "small", 0.0)


def test_sizes_that_are_not_known_yet_have_names():
    message = r"k_pages has shape \[1, 4, 4, 2, 8\]; it must be \[P, page_size, Hkv, D\]"
    with pytest.raises(ValueError, match=message):
        kernels.kv_append(X, X, POOL[None], *APPEND[3:6])


def test_numpy_needs_no_way_of_its_own():
    links = build_tree(np.array([[-1, 0, 0]], np.int32))
    logits = np.random.default_rng(0).standard_normal((1, 3, 50)).astype(np.float32)
    tokens, lens = np.array([[1, 2, 3]], np.int32), np.array([4], np.int32)
    sampling = SamplingTensors.of(1, temperature=1.0)
    walk = kernels.verify_tree_match(logits, tokens, links, lens, sampling)
    same = kernels.verify_tree_match(
        *(torch.from_numpy(a) for a in (logits, tokens)),
        kernels.TreeLinks(*(torch.from_numpy(a) for a in links)),
        torch.from_numpy(lens),
        sampling,
    )
    for array, tensor in zip(walk, same, strict=True):
        assert isinstance(array, np.ndarray)
        assert (array == tensor.numpy()).all()


def test_scores_and_growth_under_torch_compile():
    def f(logits, positions, sampling):
        scores = torch.empty((1, 3))
        drawn = sample(logits, positions, sampling, num_samples=3, scores=scores)
        roots = torch.zeros(1, dtype=torch.int32)
        return drawn, scores, kernels.grow_offsets(roots, drawn[:, None], scores[:, None], 3)

    args = torch.randn(1, 20), torch.zeros(1, dtype=torch.int64), SamplingTensors.of(1)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(*args), f(*args), strict=True):
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        assert all(torch.equal(a, b) for a, b in pairs)
