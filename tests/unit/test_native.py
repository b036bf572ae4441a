"""The decoder in one call: its threads, its rows, what it refuses."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from helpers.paged import ancestor_words
from helpers.tiny_models import random_model
from inferlab import _C
from inferlab.models import FINAL_HIDDEN, ForwardBatch, HFModel
from inferlab.models.native import Angles

VOCAB, HIDDEN = 500, 96
PARENTS = [[-1, 0, 0, 1, 1], [-1, 0, -2, -2, -2], [-1, 0, 1, 2, -2]]
COUNTS = torch.tensor([5, 2, 4], dtype=torch.int32)
LAYERS = (0, 2, FINAL_HIDDEN)


def target_of(kind=LlamaConfig, dtype=torch.float32, **settings) -> HFModel:
    """More weights than one thread is thought enough for."""
    config = kind(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=200, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
        **settings,
    )  # fmt: skip
    target = HFModel(random_model(config, seed=5).to(dtype))
    assert target._fused is not None
    return target


def trees(seq_lens=(40, 7, 1500), **changes) -> ForwardBatch:
    generator = torch.Generator().manual_seed(1)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    depths = torch.tensor([[0, 1, 1, 2, 2], [0, 1, 0, 0, 0], [0, 1, 2, 3, 0]])
    batch = ForwardBatch(
        tokens=torch.randint(0, VOCAB, (3, 5), generator=generator),
        positions=lens.long()[:, None] + depths,
        seq_lens=lens,
        block_table=torch.randperm(3 * 100, generator=generator).int().view(3, 100),
        ancestors=ancestor_words(PARENTS),
        num_nodes=COUNTS,
    )
    return replace(batch, **changes)


def cache_of(target: HFModel):
    cache = target.new_cache(300)
    generator = torch.Generator().manual_seed(2)
    for pool in cache.pools:
        for pages in (pool.k, pool.v):
            pages.copy_(torch.randn(pages.shape, generator=generator))
    return cache


@pytest.fixture(autouse=True)
def threads_as_before():
    yield
    _C.set_num_threads(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_one_thread(dtype):
    """The long text's positions are split over tasks, where there are threads for them."""
    target, results = target_of(dtype=dtype), []
    for threads in (1, 2, 3, 7):
        _C.set_num_threads(threads)
        for _ in range(20):
            results.append(target.forward(trees(), cache_of(target), LAYERS))
    for logits, features in results[1:]:
        assert torch.equal(logits, results[0].logits)
        assert torch.equal(features, results[0].features)


def test_models_of_several_threads_run_beside_each_other():
    targets = [target_of(), target_of(rope_theta=500.0)]
    expected = [target.forward(trees(), cache_of(target)).logits for target in targets]
    wrong = []

    def run(target, logits):
        cache = cache_of(target)
        for _ in range(50):
            if not torch.equal(target.forward(trees(), cache).logits, logits):
                wrong.append(target)

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(targets, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("layers", [(), (FINAL_HIDDEN,), (1, FINAL_HIDDEN, 0)])
@pytest.mark.parametrize("scored", [None, [0, 4, 6, 13], []])
def test_it_computes_what_the_modules_do(kind, layers, scored):
    target = target_of(kind)
    batch = trees(scored=None if scored is None else torch.tensor(scored, dtype=torch.int64))
    ours = target.forward(batch, cache_of(target), layers)
    target._fused = None
    theirs = target.forward(batch, cache_of(target), layers)
    real = torch.arange(5) < COUNTS[:, None]
    if scored is None:
        assert not ours.logits[~real].any(), "zeros at padding"
        torch.testing.assert_close(ours.logits[real], theirs.logits[real], rtol=1e-4, atol=1e-5)
    else:
        assert ours.logits.shape == (len(scored), 1, VOCAB)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    if not layers:
        assert ours.features is None
        return
    assert ours.features.shape == (3, 5, len(layers) * HIDDEN)
    assert not ours.features[~real].any()
    torch.testing.assert_close(ours.features[real], theirs.features[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": torch.full((3, 5), VOCAB)}, IndexError, r"ids are in \[0, 500\)"),
        ({"positions": torch.full((3, 5), -1)}, ValueError, "positions must be at least 0"),
        ({"block_table": torch.full((3, 100), 300).int()}, ValueError, "a used page must be in"),
        ({"num_nodes": torch.tensor([5, 6, 1]).int()}, ValueError, r"num_nodes\[1\] is 6"),
        ({"scored": torch.tensor([7])}, ValueError, "scored has a row that is none, or padding"),
    ],
)  # fmt: skip
def test_what_it_refuses(changes, error, message):
    target = target_of()
    with pytest.raises(error, match=message):
        target.forward(trees(**changes), cache_of(target))


def test_ids_of_padding_are_not_looked_at():
    target = target_of()
    tokens = trees().tokens.clone()
    tokens[1, 2:] = -1
    expected = target.forward(trees(), cache_of(target)).logits
    assert torch.equal(target.forward(trees(tokens=tokens), cache_of(target)).logits, expected)


def test_pages_of_another_type_are_refused():
    target = target_of()
    other = target_of(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="the pages are of another model"):
        target.forward(trees(), cache_of(other))


def test_angles_of_a_position_keep_their_bits_as_texts_grow():
    target = target_of()
    rotary, weight = target.model.model.rotary_emb, target.model.model.norm.weight
    angles = Angles(rotary, weight, 1500)
    angles.grow(3)
    assert len(angles.cos) == Angles.AT_ONCE
    before = angles.cos.clone(), angles.sin.clone()
    angles.grow(Angles.AT_ONCE + 1)
    assert len(angles.cos) == 1500, "no more than are asked for"
    assert torch.equal(angles.cos[: Angles.AT_ONCE], before[0])
    assert torch.equal(angles.sin[: Angles.AT_ONCE], before[1])
    whole = angles.of(torch.arange(1500)[None])
    torch.testing.assert_close((angles.cos, angles.sin), whole)
