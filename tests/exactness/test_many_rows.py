"""A row's bits do not depend on how many rows share a forward: alone, in a prompt read at once or
in chunks, in a large batch of large trees."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, MixtralConfig, Phi3Config, Qwen2MoeConfig, Qwen3MoeConfig

from helpers.isas import ISAS
from helpers.pairwise import pairwise
from helpers.tiny_models import FAMILIES as TINY
from helpers.tiny_models import VOCAB, random_model, tiny_model
from inferlab import _C
from inferlab.models import ForwardBatch, HFModel
from inferlab.models.stable import StableProducts
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import NgramDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.types import SamplingParams

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILIES = ["llama", "gpt2", "opt"]  # fused; Conv1D; linear layers of its own modules
PAGE_SIZE = 16


@cache
def target_of(family: str, dtype: torch.dtype) -> HFModel:
    return HFModel(tiny_model(family).to(dtype))


@pytest.fixture
def forced_isa(isa):
    _C.force_isa(isa)
    yield isa
    _C.force_isa("auto")


@torch.inference_mode()
def read(target, tokens, chunk):
    """Logits [B, N, V] of texts [B, N] read in chunks, and the cache."""
    size, length = tokens.shape
    pages = -(-length // PAGE_SIZE)
    cache_ = target.new_cache(size * pages, PAGE_SIZE)
    table = torch.arange(size * pages, dtype=torch.int32).view(size, pages)
    parts = []
    for start in range(0, length, chunk):
        part = tokens[:, start : start + chunk]
        positions = torch.arange(start, start + part.shape[1]).expand(size, -1)
        lens = torch.full((size,), start, dtype=torch.int32)
        parts.append(target.forward(ForwardBatch(part, positions, lens, table), cache_).logits)
    return torch.cat(parts, dim=1), cache_


@pairwise(
    isa=ISAS,
    family=FAMILIES,
    shape={"1x49": (1, 49), "2x65": (2, 65), "8x32": (8, 32), "16x64": (16, 64)},
    dtype=DTYPES,
)
def test_logits_and_kv_are_the_same_bits_in_any_company(forced_isa, family, shape, dtype):
    size, length = shape
    target = target_of(family, dtype)
    generator = torch.Generator().manual_seed(size)
    tokens = torch.randint(3, VOCAB, (size, length), generator=generator)
    together, cache_together = read(target, tokens, length)
    some = [0, size // 2, size - 1]
    for b in sorted(set(some)):
        alone, cache_alone = read(target, tokens[b : b + 1], 1)
        assert torch.equal(together[b], alone[0])
        pages = cache_alone.num_pages
        for (k, v), (k_all, v_all) in zip(cache_alone.pages, cache_together.pages, strict=True):
            assert torch.equal(k_all[b * pages : (b + 1) * pages], k)
            assert torch.equal(v_all[b * pages : (b + 1) * pages], v)
    in_chunks, _ = read(target, tokens, 19)
    assert torch.equal(in_chunks, together)


@settings(max_examples=40, deadline=None)
@given(
    isa=st.sampled_from(ISAS),
    family=st.sampled_from(TINY),
    dtype=st.sampled_from(DTYPES),
    size=st.integers(1, 40),
    length=st.integers(1, 70),
    chunks=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 2**32),
)
def test_any_company_in_any_chunks(isa, family, dtype, size, length, chunks, seed):
    target = target_of(family, dtype)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB, (size, length), generator=generator)
    some = torch.randperm(size, generator=generator)[: 1 + seed % size]
    _C.force_isa(isa)
    try:
        every, _ = read(target, tokens, chunks[0])
        few, _ = read(target, tokens[some], chunks[1])
    finally:
        _C.force_isa("auto")
    assert torch.equal(every[some], few)


_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 104,  # no multiple of 64: torch's activations end in another function
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40, "decoder_sparse_step": 1}
ODD = {
    "mixtral": lambda: MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: Qwen2MoeConfig(**_SHAPE, **_EXPERTS, num_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_SHAPE, **_EXPERTS, num_experts=4, head_dim=16),
    "phi3": lambda: Phi3Config(**_SHAPE, pad_token_id=None),
    "gpt2": lambda: GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_inner=104),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ODD)
def test_experts_and_odd_widths_are_the_same_bits_in_any_company(family, dtype, threads):
    """Also where more threads than two share an activation at places that are no vector's end."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        target = HFModel(random_model(ODD[family](), seed=2).to(dtype))
        tokens = torch.randint(3, VOCAB, (9, 41), generator=torch.Generator().manual_seed(9))
        together, _ = read(target, tokens, 41)
        for b in (0, 8):
            assert torch.equal(together[b], read(target, tokens[b : b + 1], 1)[0][0])
        assert torch.equal(read(target, tokens, 19)[0], together)
    finally:
        torch.set_num_threads(before)


def test_activations_in_shares_of_whole_vectors():
    x = torch.randn(700, 104)
    for activate in (torch.tanh, torch.nn.functional.gelu, torch.nn.functional.silu, torch.sigmoid):
        with StableProducts():
            together = activate(x)
            alone = torch.stack([activate(row[None])[0] for row in x])
        assert torch.equal(together, alone)
        torch.testing.assert_close(together, activate(x))


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "top-p"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_large_batches_of_large_trees_give_plain_decodings_tokens(family, dtype, params):
    """Up to 12 x 31 rows a step; equal to the last bit, so ties are no excuse."""
    target = target_of(family, dtype)
    prompts = [[(7 * i + 13 * j) % (VOCAB - 5) + 3 for j in range(12 + i)] for i in range(12)]
    requests = [
        (p, SamplingParams(max_tokens=32, ignore_eos=True, seed=i, **params))
        for i, p in enumerate(prompts)
    ]

    def decode(drafter, batch):
        cache_ = target.new_cache(200, PAGE_SIZE)
        engine = Engine(target, cache_, Policy(), FixedController(6), drafter, batch)
        return [r.token_ids for r in engine.generate(requests)]

    plain = decode(None, 1)
    assert decode(None, 12) == plain
    assert decode(NgramDrafter(max_depth=6, branches=5), 12) == plain
