"""Ragged trees without their padding: the bits of each sequence alone, plain decoding's tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MixtralConfig

from helpers.bundled import PROMPTS, plain
from helpers.paged import ancestor_words
from helpers.pairwise import pairwise
from helpers.tiny_models import FAMILIES, VOCAB, random_model, tiny_model
from inferlab import SpeculativePipeline
from inferlab.models import FINAL_HIDDEN, EarlyExit, ForwardBatch, HFModel
from inferlab.models.packing import Packing
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import NgramDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.types import SamplingParams

# The fused families also by their own modules.
PATHS = (*FAMILIES, "llama/modules", "qwen3/modules", "llama/early", "gpt2/early")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAGE_SIZE = 4
MAX_NODES = 9
LAYERS = (0, 1, FINAL_HIDDEN)


@cache
def target_of(path: str, dtype: torch.dtype) -> HFModel:
    family, _, way = path.partition("/")
    target = HFModel(tiny_model(family).to(dtype))
    if way == "modules":
        assert target._fused is not None
        target._fused = None
    return EarlyExit(target, 2) if way == "early" else target


def is_native(target: HFModel) -> bool:
    return target._fused is not None


def ragged(counts: list[int], chain: bool, seed: int) -> tuple[ForwardBatch, torch.Tensor, int]:
    """Trees of ``counts`` nodes behind texts of different lengths, their real rows, the pages."""
    generator = torch.Generator().manual_seed(seed)
    size, nodes = len(counts), max(counts)
    parents, depths = [], torch.zeros(size, nodes, dtype=torch.int64)
    for b, count in enumerate(counts):
        row = [-1, *(int(torch.randint(0, n, (), generator=generator)) for n in range(1, count))]
        row = list(range(-1, count - 1)) if chain else row
        for n, parent in enumerate(row[1:], start=1):
            depths[b, n] = depths[b, parent] + 1
        parents.append(row + [-2] * (nodes - count))
    seq_lens = torch.randint(0, 40, (size,), generator=generator, dtype=torch.int32)
    pages = -(-(40 + nodes) // PAGE_SIZE)
    batch = ForwardBatch(
        tokens=torch.randint(3, VOCAB, (size, nodes), generator=generator),
        positions=seq_lens.long()[:, None] + depths,
        seq_lens=seq_lens,
        block_table=torch.randperm(size * pages, generator=generator).int().view(size, pages),
        ancestors=None if chain else ancestor_words(parents),
        num_nodes=torch.tensor(counts, dtype=torch.int32),
    )
    is_node = torch.arange(nodes) < batch.num_nodes[:, None]
    return batch, is_node.flatten().nonzero().flatten(), size * pages


def alone(batch: ForwardBatch, b: int) -> ForwardBatch:
    """One sequence's real rows."""
    count, one = int(batch.num_nodes[b]), slice(b, b + 1)
    return replace(
        batch,
        tokens=batch.tokens[one, :count],
        positions=batch.positions[one, :count],
        seq_lens=batch.seq_lens[one],
        block_table=batch.block_table[one],
        ancestors=None if batch.ancestors is None else batch.ancestors[one, :count].contiguous(),
        num_nodes=None,
    )


@torch.inference_mode()
def assert_padding_changes_no_bit(target, counts, chain, seed, layers=LAYERS):
    """Together as each sequence alone."""
    batch, rows, num_pages = ragged(counts, chain, seed)
    caches = []
    for _ in range(2):
        caches.append(target.new_cache(num_pages, PAGE_SIZE))
        generator = torch.Generator().manual_seed(seed)
        for pool in caches[-1].pools:
            for pages in (pool.k, pool.v):
                pages.copy_(torch.randn(pages.shape, generator=generator))
    together = target.forward(batch, caches[0], layers)
    each = [target.forward(alone(batch, b), caches[1], layers) for b in range(len(counts))]
    for ours, *expected in zip(together, *each, strict=True):
        if ours is None:
            assert expected == [None] * len(counts)
            continue
        assert ours.shape[:2] == batch.tokens.shape
        assert torch.equal(ours.flatten(0, 1)[rows], torch.cat([x[0] for x in expected]))
        assert ours.isfinite().all()
    for pool, expected in zip(caches[0].pools, caches[1].pools, strict=True):
        assert torch.equal(pool.k, expected.k)
        assert torch.equal(pool.v, expected.v)


@pytest.fixture
def packings(monkeypatch):
    """One entry for each forward that packed: rows of all, B * N."""
    seen = []

    class Watched(Packing):
        def __init__(self, rows, size, nodes):
            super().__init__(rows, size, nodes)
            seen.append((len(rows), size * nodes))

    monkeypatch.setattr("inferlab.models.hf.Packing", Watched)
    return seen


@pairwise(
    path=PATHS,
    dtype=DTYPES,
    counts={
        "few": [8, 1, 1, 8, 1, 1, 1, 8],
        "all_lengths": [3, 7, 1, 9, 5, 2, 8, 4, 6],
        "last": [1, 1, 5],
        "alone": [6],
        "roots": [1, 1],
    },
    chain={"chain": True, "tree": False},
)
def test_rows_have_the_bits_of_sequences_alone(packings, path, dtype, counts, chain):
    target = target_of(path, dtype)
    for layers in ((), (FINAL_HIDDEN,), LAYERS):
        assert_padding_changes_no_bit(target, counts, chain, seed=len(counts), layers=layers)
    packed = (sum(counts), len(counts) * max(counts))
    assert packings == ([packed] * 3 if packed[0] < packed[1] and not is_native(target) else [])


@settings(max_examples=60, deadline=None)
@given(
    path=st.sampled_from(PATHS),
    dtype=st.sampled_from(list(DTYPES.values())),
    counts=st.lists(st.integers(1, MAX_NODES), min_size=1, max_size=20),
    chain=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_counts(path, dtype, counts, chain, seed):
    assert_padding_changes_no_bit(target_of(path, dtype), counts, chain, seed)


def test_rows_that_are_scored_apart_are_those_of_the_padded_batch():
    target = target_of("llama", torch.float32)
    batch, _, num_pages = ragged([1, 6, 2], chain=True, seed=3)
    expected = target.forward(batch, target.new_cache(num_pages, PAGE_SIZE)).logits
    batch.scored = torch.tensor([0, 11, 13])
    scored = target.forward(batch, target.new_cache(num_pages, PAGE_SIZE)).logits
    assert torch.equal(scored[:, 0], expected.flatten(0, 1)[batch.scored])


def test_what_is_not_known_to_work_by_rows_sees_the_padded_batch(packings):
    """A hook may look at the shape, and so may a family that no test covers."""
    batch, _, num_pages = ragged([1, 6, 2], chain=True, seed=3)
    shapes = []
    watched = tiny_model("gpt2")
    watched.transformer.wte.register_forward_hook(lambda _, args, __: shapes.append(args[0].shape))
    experts = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    for target in (HFModel(watched), HFModel(random_model(experts, seed=2))):
        target.forward(batch, target.new_cache(num_pages, PAGE_SIZE))
    assert shapes[-1] == batch.tokens.shape
    assert packings == []


def prompts_of_many_kinds(count: int) -> list[list[int]]:
    """Some repeat themselves, and are drafted for; others do not at first."""
    repeating = [[5, 9, 33, 12 + i] * 3 for i in range(count // 3)]
    others = [[(7 * i + 13 * j * j) % (VOCAB - 5) + 3 for j in range(9 + i)] for i in range(count)]
    return (repeating + others)[:count]


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "top-p"]
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("path", ["llama", "qwen3/modules", "gpt2", "gemma2"])
@pytest.mark.parametrize("branches", [1, 3])
def test_ngram_trees_of_a_large_batch_give_plain_decodings_tokens(
    packings, path, dtype, params, branches
):
    """Equal to the last bit, so ties are no excuse."""
    target = target_of(path, dtype)
    requests = [
        (prompt, SamplingParams(max_tokens=24, ignore_eos=True, seed=i, **params))
        for i, prompt in enumerate(prompts_of_many_kinds(16))
    ]

    def decode(drafter, batch):
        cache_ = target.new_cache(200)
        engine = Engine(target, cache_, Policy(), FixedController(7), drafter, batch)
        return [r.token_ids for r in engine.generate(requests)]

    expected = decode(None, 1)
    assert packings == []
    assert decode(NgramDrafter(max_depth=7, branches=branches), 16) == expected
    assert bool(packings) != is_native(target)
    assert all(1 <= rows < total for rows, total in packings)


def test_drafters_that_read_a_ragged_forward_change_no_token():
    """Hidden states for Medusa, runners-up for recycling, beside the ragged trees of ngram."""
    prompts = [*PROMPTS, *(f"{p}\nx = {i}\n" for i, p in enumerate(PROMPTS))]
    options = {"target": plain("float32").target, "max_batch": len(prompts)}
    expected = SpeculativePipeline(draft_mode="none", **options).generate(prompts, max_tokens=24)
    ensemble = {"drafters": ["ngram", "recycling", "medusa"]}
    for tree_nodes in (4, 20):
        drafting = SpeculativePipeline(
            draft_mode="ensemble", ensemble=ensemble, tree_nodes=tree_nodes, **options
        )
        results = drafting.generate(prompts, max_tokens=24)
        assert [r["token_ids"] for r in results] == [r["token_ids"] for r in expected]
