"""The paged cache's bookkeeping and the check that two models share a tokenizer."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import tiny_model, tiny_tokenizer
from inferlab.models import FakeLM, HFModel, KVCache, TargetModel, tokenizer_difference


def test_pools_group_layers_of_one_shape() -> None:
    cache = KVCache([(2, 32), (1, 64), (2, 32)], num_pages=3, page_size=4, dtype=torch.bfloat16)
    assert [pool.layers for pool in cache.pools] == [(0, 2), (1,)]
    assert cache.pools[0].k.shape == (2, 3, 4, 2, 32)
    assert cache.pools[1].v.shape == (1, 3, 4, 1, 64)
    assert cache.num_layers == 3
    assert cache.bytes_per_token == 3 * 2 * 64 * 2
    assert cache.nbytes == cache.bytes_per_token * 12
    assert cache.nbytes == sum(p.k.nbytes + p.v.nbytes for p in cache.pools)
    cache.pages[2][0].fill_(1)
    assert cache.pools[0].k[1].min() == 1
    assert cache.pools[0].k[0].max() == 0


@pytest.mark.parametrize(("stored", "bytes_per_head"), [("int8", 36), ("fp8", 32)])
def test_pages_of_8_bits_take_half(stored: str, bytes_per_head: int) -> None:
    cache = KVCache([(2, 32)] * 3, 4, dtype=torch.bfloat16, kv_cache_dtype=stored)
    assert cache.bytes_per_token == 3 * 2 * 2 * bytes_per_head
    assert cache.nbytes == sum(p.k.nbytes + p.v.nbytes for p in cache.pools)
    assert cache.dtype == torch.bfloat16


def test_formats_of_pages_that_there_are_not_are_named() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_dtype is 'int4'; it must be auto, int8 or fp8"):
        KVCache([(2, 32)], 4, kv_cache_dtype="int4")
    with pytest.raises(ValueError, match=r"kv_cache_dtype is 'fp8', which the CPU's kernels read"):
        KVCache([(2, 32)], 4, kv_cache_dtype="fp8", device="meta")


def test_compaction_and_page_copies_reach_every_pool() -> None:
    cache = KVCache([(1, 8), (2, 8)], num_pages=4, page_size=2)
    for pool in cache.pools:
        for page in range(4):
            for row in range(2):
                pool.k[:, page, row] = 10 * page + row
                pool.v[:, page, row] = -(10 * page + row)
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    seq_lens = torch.tensor([1], dtype=torch.int32)
    # Slots 1.. of the sequence: (page 2, row 1), (0, 0), (0, 1), (3, 0). Nodes 0, 2, 3 are kept.
    nodes = torch.tensor([[0, 2, 3]], dtype=torch.int32)
    cache.compact(table, seq_lens, nodes, torch.tensor([3], dtype=torch.int32))
    for pool in cache.pools:
        assert pool.k[0, 2, 1].unique().tolist() == [21]
        assert pool.k[0, 0, 0].unique().tolist() == [1]
        assert pool.v[0, 0, 1].unique().tolist() == [-30]
    cache.copy_pages(torch.tensor([2], dtype=torch.int32), torch.tensor([1], dtype=torch.int32))
    for pool in cache.pools:
        assert torch.equal(pool.k[:, 1], pool.k[:, 2])
        assert torch.equal(pool.v[:, 1], pool.v[:, 2])


@pytest.mark.parametrize(
    ("shapes", "pages", "page_size", "message"),
    [
        ([], 1, 16, "at least one layer"),
        ([(1, 8)], 0, 16, "num_pages is 0"),
        ([(1, 8)], 1, 12, "page_size is 12, must be a power of two"),
        ([(1, 8)], 1, 0, "page_size is 0"),
    ],
)
def test_bad_sizes(shapes: list[tuple[int, int]], pages: int, page_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCache(shapes, pages, page_size)


def test_too_large_a_cache_says_what_it_needs() -> None:
    with pytest.raises(MemoryError, match=r"1000000000 KV pages of 16 tokens need \d+ MB on cpu"):
        KVCache([(32, 128)] * 32, 10**9)


def test_models_are_target_models() -> None:
    assert isinstance(FakeLM(), TargetModel)
    assert isinstance(HFModel(tiny_model("llama")), TargetModel)


def _wrapped(tokenizer: PreTrainedTokenizerFast | None, name: str) -> HFModel:
    return HFModel(tiny_model("llama"), tokenizer, name=name)


def _copy(**changes: object) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer()._tokenizer).from_str(
            tiny_tokenizer()._tokenizer.to_str()
        ),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_equal_tokenizers_pass() -> None:
    target = _wrapped(tiny_tokenizer(), "big")
    assert tokenizer_difference(target, target) is None
    assert tokenizer_difference(target, _wrapped(_copy(), "small")) is None
    # Nothing here pads, so what pads a text does not matter.
    assert tokenizer_difference(target, _wrapped(_copy(pad_token="</s>"), "small")) is None
    assert tokenizer_difference(FakeLM(), FakeLM(agreement=0.5)) is None
    assert tokenizer_difference(FakeLM(vocab_size=10), FakeLM(vocab_size=10)) is None


def difference(target, draft) -> str:
    found = tokenizer_difference(target, draft)
    assert found is not None
    return found


def test_other_vocabularies_are_told() -> None:
    target = _wrapped(tiny_tokenizer(), "big")
    assert "160 and 150 tokens" in difference(target, _wrapped(tiny_tokenizer(150), "small"))
    found = difference(_wrapped(tiny_tokenizer(150), "big"), _wrapped(_copy(), "small"))
    assert "are in the draft only (" in found
    assert "tokens have different ids" in difference(target, FakeLM())


def test_other_special_tokens_are_told() -> None:
    other = _wrapped(_copy(eos_token="<pad>"), "small")
    found = difference(_wrapped(tiny_tokenizer(), "big"), other)
    assert found == "eos_token is '</s>' and '<pad>'"


def test_other_splitting_is_told() -> None:
    import json

    state = json.loads(tiny_tokenizer()._tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][::-1]
    other = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer()._tokenizer).from_str(json.dumps(state)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    found = difference(_wrapped(tiny_tokenizer(), "big"), _wrapped(other, "small"))
    assert "split the same text differently" in found


def test_one_tokenizer_missing_is_refused() -> None:
    with pytest.raises(ValueError, match="small has no tokenizer; add"):
        tokenizer_difference(_wrapped(tiny_tokenizer(), "big"), _wrapped(None, "small"))
    with pytest.raises(ValueError, match="no tokenizers and 10 and 12 ids"):
        tokenizer_difference(FakeLM(vocab_size=10), FakeLM(vocab_size=12))
