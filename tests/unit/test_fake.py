"""FakeLM: deterministic, reads all it knows from the cache, agrees as often as asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.paged import PagedRunner, path_to
from inferlab.models import FakeLM, ForwardBatch
from inferlab.models.fake_tokenizer import fake_tokenizer

PARENTS = [-1, 0, 0, 1, 1, 2, 3, 6]


def greedy(model: FakeLM, prompt: list[int], count: int, page_size: int = 16) -> list[int]:
    runner = PagedRunner(model, page_size=page_size)
    tokens = [int(runner.chain([prompt], last_only=True)[0, -1].argmax())]
    while len(tokens) < count:
        tokens.append(int(runner.chain([tokens[-1:]])[0, -1].argmax()))
    return tokens


def test_deterministic_and_seeded() -> None:
    prompt = [300, 310, 320]
    first = greedy(FakeLM(seed=3), prompt, 20)
    assert first == greedy(FakeLM(seed=3), prompt, 20, page_size=4)
    assert first != greedy(FakeLM(seed=4), prompt, 20)
    assert len(set(first)) > 10


def test_every_token_and_its_place_counts() -> None:
    model = FakeLM()
    prompt = list(range(257, 297))
    base = PagedRunner(model).chain([prompt])[0, -1]
    swapped = [prompt[1], prompt[0], *prompt[2:]]
    assert not torch.equal(PagedRunner(model).chain([swapped])[0, -1], base)
    changed = [400, *prompt[1:]]
    assert not torch.equal(PagedRunner(model).chain([changed])[0, -1], base)


def test_chunks_and_ragged_batches_change_nothing() -> None:
    model = FakeLM(vocab_size=50)
    prompts = [[1, 2, 3, 4, 5, 6, 7], [9], [4, 4, 4]]
    runner = PagedRunner(model, batch_size=3, page_size=2)
    batched = runner.chain(prompts, last_only=True)
    for b, prompt in enumerate(prompts):
        alone = PagedRunner(model)
        for token in prompt:
            logits = alone.chain([[token]])
        assert torch.equal(batched[b, 0], logits[0, 0])


@pytest.mark.parametrize("split", [0, 3])
def test_tree_paths(split: int) -> None:
    model = FakeLM(vocab_size=40)
    prefix, tokens = [5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]
    runner = PagedRunner(model, page_size=2)
    runner.chain([prefix])
    if split:
        parts = [
            runner.tree([tokens], [PARENTS], 0, split),
            runner.tree([tokens], [PARENTS], split),
        ]
        logits = torch.cat(parts, dim=1)[0]
    else:
        logits = runner.tree([tokens], [PARENTS])[0]
    for node in range(len(tokens)):
        path = [tokens[n] for n in path_to(PARENTS, node)]
        assert torch.equal(logits[node], PagedRunner(model).chain([prefix + path])[0, -1])


def test_tree_of_more_than_64_nodes() -> None:
    model = FakeLM(vocab_size=100)
    parents = [-1] + [max(0, n - 1 - n % 3) for n in range(1, 75)]
    tokens = list(range(75))
    runner = PagedRunner(model)
    runner.chain([[3]])
    logits = runner.tree([tokens], [parents])[0]
    for node in (63, 64, 74):
        path = [tokens[n] for n in path_to(parents, node)]
        assert torch.equal(logits[node], PagedRunner(model).chain([[3, *path]])[0, -1])


def test_a_cache_that_was_not_compacted_shows() -> None:
    """The model holds no state: what the engine does to the pages decides what it says."""
    model = FakeLM(vocab_size=40)
    prefix, tokens = [5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]
    path = path_to(PARENTS, 5)
    sequence = prefix + [tokens[n] for n in path] + [20]
    expected = PagedRunner(model).chain([sequence])[0, -1]
    good, bad = PagedRunner(model), PagedRunner(model)
    for runner in (good, bad):
        runner.chain([prefix])
        runner.tree([tokens], [PARENTS])
    good.commit([path])
    assert torch.equal(good.chain([[20]])[0, -1], expected)
    bad.seq_lens = bad.seq_lens + len(path)
    assert not torch.equal(bad.chain([[20]])[0, -1], expected)


@pytest.mark.parametrize("agreement", [0.0, 0.3, 0.7, 1.0])
def test_agreement(agreement: float) -> None:
    target, draft = FakeLM(seed=9), FakeLM(seed=9, agreement=agreement)
    rng = np.random.default_rng(0)
    tokens = rng.integers(257, 512, size=(8, 512)).tolist()
    a = PagedRunner(target, batch_size=8, max_tokens=512).chain(tokens).argmax(-1)
    b = PagedRunner(draft, batch_size=8, max_tokens=512).chain(tokens).argmax(-1)
    rate = (a == b).double().mean().item()
    # 4096 contexts: five standard deviations.
    assert abs(rate - agreement) <= 5 * (agreement * (1 - agreement) / 4096) ** 0.5


def test_text_is_made_of_words() -> None:
    model = FakeLM()
    assert model.eos_token_ids == (model.tokenizer.eos_token_id,)
    prompt = model.tokenizer.encode("Explain KV cache simply.")
    tokens = greedy(model, prompt, 30)
    assert min(tokens) > model.eos_token_ids[0]
    text = model.tokenizer.decode(tokens)
    assert text.replace(" ", "").isalpha()
    assert len(text.split()) == 30


@pytest.mark.parametrize(
    "text", ["Hello, world!", "the tree\n\tof café 漢字 \x00 <x>", " ", "a  b"]
)
def test_tokenizer_round_trip(text: str) -> None:
    tokenizer = fake_tokenizer(512)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer) == 512


def test_tokenizer_of_any_size() -> None:
    assert len(fake_tokenizer(5000)) == 5000
    assert fake_tokenizer(320).encode(" the") == [257]
    assert FakeLM(vocab_size=12).tokenizer is None
    with pytest.raises(ValueError, match="at least 320"):
        fake_tokenizer(319)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 1}, "vocab_size is 1"),
        ({"agreement": 1.5}, "agreement is 1.5"),
        ({"agreement": -0.1}, "agreement is -0.1"),
        ({"agreement": float("nan")}, "agreement is nan"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FakeLM(**arguments)


def test_slots_outside_the_block_table_are_an_error() -> None:
    model = FakeLM(vocab_size=12)
    cache = model.new_cache(1, page_size=4)
    batch = ForwardBatch(
        tokens=torch.zeros((1, 5), dtype=torch.int64),
        positions=torch.arange(5)[None],
        seq_lens=torch.zeros(1, dtype=torch.int32),
        block_table=torch.zeros((1, 1), dtype=torch.int32),
    )
    with pytest.raises(ValueError, match="block"):
        model.forward(batch, cache)
