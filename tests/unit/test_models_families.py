"""Every family on the paged cache computes what Hugging Face's own attention computes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from transformers import GPT2Config, PreTrainedModel

from helpers.hub_cache import hub_config
from helpers.paged import PagedRunner, path_to
from helpers.tiny_models import (
    CONTEXT,
    FAMILIES,
    VOCAB,
    WINDOW,
    random_model,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from inferlab.models import HFModel
from inferlab.models.architecture import TESTED

# A tree with siblings at several depths; longer than the tiny window along its deepest path.
PARENTS = [-1, 0, 0, 1, 1, 2, 3, 6, 7, 8, 9, 10, 4, 5]


# All skip their modules on the CPU (models/native.py); with "/modules" they do not. What follows
# "+" changes a family's configuration, "!" before it to what only its modules can do.
CHANGES: dict[str, dict[str, object]] = {
    "gpt_neox+in turn": {"use_parallel_residual": False, "hidden_act": "relu"},
    "opt+gelu": {"activation_function": "gelu", "enable_bias": False},
    "gemma3+capped": {"final_logit_softcapping": 2.0},
    "opt+!projected": {"word_embed_proj_dim": 32},
    "opt+!post-norm": {"do_layer_norm_before": False},
    "gpt2+!swish": {"activation_function": "quick_gelu"},
}
PATHS = (*FAMILIES, *(f"{family}/modules" for family in FAMILIES), *CHANGES)


def test_the_families_that_count_as_tested_are_those_that_are():
    assert {tiny_config(family).model_type for family in FAMILIES} == set(TESTED)


def model_of(path: str) -> PreTrainedModel:
    config = tiny_config(path.partition("/")[0].partition("+")[0])
    for name, value in CHANGES.get(path, {}).items():
        setattr(config, name, value)
    return random_model(config)


@cache
def adapter(path: str) -> HFModel:
    target = HFModel(model_of(path), tiny_tokenizer(), name=path)
    assert target.engine == ("hf" if "!" in path else "native")
    if path.endswith("/modules"):
        target._fused = None
    return target


@cache
def plain(path: str) -> PreTrainedModel:
    return model_of(path)


@torch.inference_mode()
def plain_logits(family: str, ids: Sequence[int]) -> torch.Tensor:
    """Logits [len(ids), V] of one unpadded, uncached pass through the untouched model."""
    return plain(family)(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def random_ids(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parametrize("family", PATHS)
def test_prefill(family: str) -> None:
    ids = random_ids(37, 1)
    expected = plain_logits(family, ids)
    for page_size in (1, 4, 64):
        runner = PagedRunner(adapter(family), page_size=page_size)
        assert_same(runner.chain([ids])[0], expected)


@pytest.mark.parametrize("family", PATHS)
def test_chunked_prefill_and_decode(family: str) -> None:
    ids = random_ids(40, 2)
    expected = plain_logits(family, ids)
    runner = PagedRunner(adapter(family), page_size=8)
    start = 0
    for size in (5, 1, 11, 8, 1, 1, 1, 1, 11):
        logits = runner.chain([ids[start : start + size]])
        assert_same(logits[0], expected[start : start + size])
        start += size
    assert start == len(ids)


@pytest.mark.parametrize("family", PATHS)
def test_tree_paths(family: str) -> None:
    """Each node's logits are those of its path as a plain sequence, siblings notwithstanding."""
    prefix, tokens = random_ids(19, 3), random_ids(len(PARENTS), 4)
    runner = PagedRunner(adapter(family))
    runner.chain([prefix])
    logits = runner.tree([tokens], [PARENTS])[0]
    for leaf in sorted(set(range(len(PARENTS))) - set(PARENTS)):
        path = path_to(PARENTS, leaf)
        expected = plain_logits(family, prefix + [tokens[n] for n in path])[len(prefix) :]
        assert_same(logits[path], expected)


@pytest.mark.parametrize("family", PATHS)
def test_compaction_then_decode(family: str) -> None:
    """What is left after a partly accepted tree is a plain sequence again, for every layer."""
    prefix, tokens = random_ids(13, 5), random_ids(len(PARENTS), 6)
    runner = PagedRunner(adapter(family), page_size=4)
    runner.chain([prefix])
    runner.tree([tokens], [PARENTS])
    path = path_to(PARENTS, 9)
    runner.commit([path])
    rest = random_ids(4, 7)
    sequence = prefix + [tokens[n] for n in path] + rest
    assert_same(runner.chain([rest])[0], plain_logits(family, sequence)[-len(rest) :])


@pytest.mark.parametrize("family", PATHS)
def test_ragged_batch(family: str) -> None:
    """Prompts and trees of different sizes in one batch; logits of the last rows only."""
    prompts = [random_ids(n, 10 + n) for n in (3, 21, 1, 12, 7)]
    runner = PagedRunner(adapter(family), batch_size=len(prompts))
    last = runner.chain(prompts, last_only=True)
    assert last.shape == (len(prompts), 1, VOCAB)
    for b, prompt in enumerate(prompts):
        assert_same(last[b], plain_logits(family, prompt)[-1:])

    sizes = (5, 14, 1, 9, 3)
    parents = [PARENTS[:n] + [-2] * (len(PARENTS) - n) for n in sizes]
    tokens = [random_ids(len(PARENTS), 30 + b) for b in range(len(prompts))]
    logits = runner.tree(tokens, parents)
    for b, (prompt, size) in enumerate(zip(prompts, sizes, strict=True)):
        for node in range(size):
            path = path_to(parents[b], node)
            expected = plain_logits(family, prompt + [tokens[b][n] for n in path])[-1]
            assert_same(logits[b, node], expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_tree_grown_level_by_level(family: str) -> None:
    """`node_offset`: nodes forwarded in several passes, as a draft model draws its tree."""
    prefix, tokens = random_ids(9, 8), random_ids(len(PARENTS), 9)
    whole = PagedRunner(adapter(family))
    whole.chain([prefix])
    expected = whole.tree([tokens], [PARENTS])[0]
    grown = PagedRunner(adapter(family))
    grown.chain([prefix])
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 14)):
        logits = grown.tree([tokens], [PARENTS], first, last)[0]
        assert_same(logits, expected[first:last])


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_tree_of_more_than_64_nodes(family: str) -> None:
    """Ancestor bits in a second word."""
    parents = [-1] + [max(0, n - 1 - n % 3) for n in range(1, 75)]
    prefix, tokens = random_ids(6, 11), random_ids(len(parents), 12)
    runner = PagedRunner(adapter(family))
    runner.chain([prefix])
    logits = runner.tree([tokens], [parents])[0]
    for leaf in (62, 63, 64, 65, 73, 74):
        path = path_to(parents, leaf)
        expected = plain_logits(family, prefix + [tokens[n] for n in path])[len(prefix) :]
        assert_same(logits[path], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_is_generate(family: str) -> None:
    target = adapter(family)
    prompt = random_ids(10, 13)
    with target.plain() as model:
        generated = model.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, eos_token_id=None
        )
    expected = generated[0, len(prompt) :].tolist()
    runner = PagedRunner(target)
    ours = [int(runner.chain([prompt], last_only=True)[0, -1].argmax())]
    while len(ours) < len(expected):
        ours.append(int(runner.chain([ours[-1:]])[0, -1].argmax()))
    assert ours == expected


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_precision(family: str, dtype: torch.dtype, tolerance: float) -> None:
    target = HFModel(tiny_model(family, dtype=dtype))
    assert target.dtype == dtype
    ids = random_ids(33, 14)
    runner = PagedRunner(target)
    logits = torch.cat([runner.chain([ids[:20]])[0], runner.chain([ids[20:]])[0]])
    assert logits.dtype == dtype
    error = (logits.float() - plain_logits(family, ids)).abs()
    assert error.mean() < tolerance / 2
    assert error.max() < tolerance * 4


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3", "gemma2", "gemma3"])
def test_windows_matter(family: str) -> None:
    """Guards the tests above: these contexts are long enough to notice a missing window."""
    windows = [spec.window for spec in adapter(family).layers]
    assert set(windows) <= {0, WINDOW}
    assert WINDOW in windows
    ids = random_ids(37, 1)
    config = plain(family).config
    full = tiny_model(family)
    full.config.sliding_window = None if family in ("mistral", "phi3") else 1000
    with torch.inference_mode():
        logits = full(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    assert config.sliding_window == WINDOW
    difference = (logits - plain_logits(family, ids)).abs().amax(-1)
    assert difference[WINDOW:].max() > 0.05
    assert difference[: WINDOW - 1].max() < 1e-4


def test_short_cut_around_the_wrappers_only_where_it_is_exact() -> None:
    """Gemma-2 squashes its logits behind the head; leaving that out would be found in the bits."""
    skipping = {family for family in FAMILIES if adapter(family)._plan.decoder is not None}
    assert skipping == set(FAMILIES) - {"gemma2"}


def test_head_dims_that_the_kernel_does_not_take_are_padded() -> None:
    """sshleifer/tiny-gpt2 has heads of one channel."""
    model = random_model(hub_config("sshleifer/tiny-gpt2"))
    ids = random_ids(30, 15)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0]
    target = HFModel(model)
    assert {(spec.head_dim, spec.cached_dim) for spec in target.layers} == {(1, 8)}
    runner = PagedRunner(target)
    assert_same(torch.cat([runner.chain([ids[:20]])[0], runner.chain([ids[20:]])[0]]), expected)


def test_layer_specs_say_what_the_model_passes() -> None:
    assert [s.scale for s in adapter("opt").layers] == [1.0] * 3
    gemma = adapter("gemma2").layers
    assert [s.softcap for s in gemma] == [1.5] * 3
    assert [s.window for s in gemma] == [WINDOW, 0, WINDOW]
    assert gemma[0].scale == pytest.approx(24**-0.5)
    assert (adapter("llama").layers[0].num_kv_heads, adapter("llama").layers[0].head_dim) == (2, 32)


@pytest.mark.parametrize("head_dim", [1, 12])
def test_head_dims_that_are_no_multiple_of_the_kernels_vectors(head_dim: int) -> None:
    """sshleifer/tiny-gpt2, which the examples name, has two heads of one channel."""
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=2 * head_dim, n_head=2, n_layer=2, n_positions=CONTEXT
    )
    ids = random_ids(20, 9)
    with torch.inference_mode():
        expected = random_model(config)(input_ids=torch.tensor([ids])).logits[0]
    runner = PagedRunner(HFModel(random_model(config)), page_size=4)
    assert_same(runner.chain([ids[:12]])[0], expected[:12])
    assert_same(runner.tree([ids[12:15]], [[-1, 0, 1]])[0], expected[12:15])
