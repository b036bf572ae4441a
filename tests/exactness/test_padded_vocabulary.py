"""Logits wider than the tokenizer: padding is never chosen, and changes no token."""

import copy
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import VOCAB, random_model, tiny_config, tiny_tokenizer
from inferlab import HFModel, SpeculativePipeline
from inferlab.baseline import ForbidPadding, LocalBaselineRunner
from inferlab.models import allowed_vocab
from inferlab.models.base import known_ids, unknown_ids

PROMPT = "the draft model guesses the draft model "
PADDING = 24


def plain_model(seed: int, layers: int = 2):
    config = tiny_config("llama")
    config.num_hidden_layers = layers
    return random_model(config, seed=seed)


def model_of(seed: int, padding: int = 0, layers: int = 2) -> HFModel:
    """A random model whose padding, if any, is what it would like best to choose."""
    model = plain_model(seed, layers)
    if padding:
        model = copy.deepcopy(model)
        model.resize_token_embeddings(VOCAB + padding, mean_resizing=False)
        with torch.no_grad():
            head = model.get_output_embeddings().weight
            head[VOCAB:] = 3 * head[torch.arange(padding) % VOCAB]
            model.get_input_embeddings().weight[VOCAB:] = 0.1
    return HFModel(model.eval(), tiny_tokenizer(), name=f"tiny + {padding}")


def tokens_of(target: HFModel, draft: HFModel | None, prompt=PROMPT, **options) -> list[list[int]]:
    settings = {name: options.pop(name) for name in ("policy", "draft_mode") if name in options}
    pipeline = SpeculativePipeline(
        target=target, draft=draft, kv_memory_mb=32, tau=0.05, seed=0, **settings
    )
    runs = [{"temperature": 0.0}, *({"temperature": 1.5, "seed": seed} for seed in range(3))]
    return [
        pipeline.generate(prompt, 40, ignore_eos=True, **run, **options)["token_ids"]
        for run in runs
    ]


@pytest.mark.parametrize("mode", ["none", "ngram", "recycling", "self", "medusa-lite"])
def test_a_padded_target_gives_the_tokens_of_the_unpadded_one(mode):
    want = tokens_of(model_of(0), None, draft_mode="none")
    assert tokens_of(model_of(0, PADDING), None, draft_mode=mode) == want


@pytest.mark.parametrize(("target", "draft"), [(0, PADDING), (PADDING, 0), (PADDING, 2 * PADDING)])
@pytest.mark.parametrize("policy", ["longest_prefix", "rejection", "conf_threshold", "typical"])
def test_widths_of_target_and_draft_change_no_token(policy, target, draft):
    want = tokens_of(model_of(0), model_of(0, layers=1), policy=policy)
    padded = tokens_of(model_of(0, target), model_of(0, draft, layers=1), policy=policy)
    assert padded == want


@settings(max_examples=25, deadline=None)
@given(
    widths=st.tuples(st.integers(0, 70), st.integers(0, 70)),
    mode=st.sampled_from(("vanilla", "ngram", "recycling", "self", "medusa-lite", "eagle-lite")),
    policy=st.sampled_from(("longest_prefix", "rejection", "conf_threshold", "typical")),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-9, 9), max_size=3),
    beyond=st.integers(0, 69),
    min_tokens=st.integers(0, 40),
)
def test_any_widths_change_no_token(widths, mode, policy, bias, beyond, min_tokens):
    if mode != "vanilla":
        policy = "longest_prefix"  # what the others draft by may look at the width
    options = {"draft_mode": mode, "policy": policy, "min_tokens": min_tokens}
    target, draft = widths

    def tokens(target, draft, bias):
        model = model_of(0, draft, layers=1) if mode == "vanilla" else None
        return tokens_of(model_of(0, target), model, logit_bias=bias, **options)

    want = tokens(0, 0, bias)
    if beyond < target:
        bias = {**bias, VOCAB + beyond: 50.0}
    assert tokens(target, draft, bias) == want


def test_bias_and_stop_ids_of_padding_do_nothing():
    bias = {VOCAB + 3: 50.0, 17: 2.0}
    want = tokens_of(model_of(0), model_of(1), logit_bias={17: 2.0})
    options = {"logit_bias": bias, "min_tokens": 20, "stop_token_ids": (VOCAB + 4,)}
    assert tokens_of(model_of(0, PADDING), model_of(1), **options) == want


def test_a_prompt_of_padding_does_not_break_a_narrower_draft():
    prompt = [5, VOCAB + 7, 9]
    want = tokens_of(model_of(0, PADDING), None, prompt, draft_mode="none")
    assert tokens_of(model_of(0, PADDING), model_of(1), prompt) == want


def test_without_a_tokenizer_all_columns_count():
    model = HFModel(plain_model(0))
    assert allowed_vocab(model) == model.vocab_size


def test_added_tokens_and_gaps_in_the_ids_are_known():
    assert allowed_vocab(model_of(0, PADDING)) == len(tiny_tokenizer()) == VOCAB
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens(["<new>"])
    assert known_ids(tokenizer) == len(tokenizer) == VOCAB + 1
    vocabulary = {"a": 0, "b": 1, "c": 7}
    gaps = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, "a")))
    assert (len(gaps), known_ids(gaps)) == (3, 8)


@pytest.mark.parametrize("mode", ["vanilla", "self", "recycling", "medusa-lite", "eagle-lite"])
def test_no_drafter_drafts_padding(mode):
    draft = model_of(1, 2 * PADDING) if mode == "vanilla" else None
    pipeline = SpeculativePipeline(
        target=model_of(0, PADDING),
        draft=draft,
        draft_mode=mode,
        controller="fixed",
        kv_memory_mb=32,
    )
    propose = pipeline.engine.drafter.propose
    drafted = []

    def recorded(batch, budget, judge=None):
        tree = propose(batch, budget)
        drafted.append(int(tree.tokens.max()))
        return tree

    pipeline.engine.drafter.propose = recorded
    pipeline.generate(PROMPT, 40, ignore_eos=True, temperature=1.0)
    assert drafted
    assert max(drafted) < VOCAB


def test_the_baseline_never_chooses_padding(tmp_path):
    with model_of(0, PADDING).plain() as model:
        model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    runner = LocalBaselineRunner(model_name=str(tmp_path), device="cpu", temperature=0)
    (want, *_) = tokens_of(model_of(0), None, draft_mode="none")
    assert runner.run(PROMPT, 40)["token_ids"] == want[: want.index(1) + 1 if 1 in want else None]


def test_end_ids_outside_the_vocabulary_are_ignored_with_one_warning(caplog):
    model = plain_model(0)
    model.generation_config.eos_token_id = [1, 9999]
    with caplog.at_level(logging.WARNING, logger="inferlab"):
        target = HFModel(model)
    assert target.eos_token_ids == (1,)
    assert len(caplog.records) == 1
    assert "end-of-text id 9999 is outside the vocabulary of 160 ids" in caplog.text
    ids = torch.tensor([[5, 6]])
    with target.plain() as plain:
        options = {"max_new_tokens": 10, "min_new_tokens": 5, "do_sample": False}
        want = plain.generate(ids, pad_token_id=0, **options)[0, 2:].tolist()
    pipeline = SpeculativePipeline(target=target, draft_mode="none", kv_memory_mb=32)
    assert pipeline.generate([5, 6], 10, min_tokens=5)["token_ids"] == want


@pytest.mark.parametrize("mode", ["none", "ngram", "recycling", "self"])
def test_ids_in_gaps_are_not_chosen(mode):
    plain = plain_model(0)
    (free, *_) = tokens_of(HFModel(copy.deepcopy(plain)), None, [5, 9, 33], draft_mode="none")
    gap = free[2]
    words = {f"w{i}": i for i in range(VOCAB) if i != gap} | {"</s>": 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "w0")), eos_token="</s>"
    )
    target = HFModel(plain, tokenizer)
    pipeline = SpeculativePipeline(target=target, draft_mode=mode, kv_memory_mb=32)
    tokens = pipeline.generate([5, 9, 33], 30, ignore_eos=True)["token_ids"]
    with target.plain() as model:
        want = model.generate(
            torch.tensor([[5, 9, 33]]),
            max_new_tokens=30,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            suppress_tokens=[gap],
        )
    assert tokens == want[0, 3:].tolist()
    assert tokens[:2] == free[:2]
    assert gap not in tokens
    processor = ForbidPadding(unknown_ids(tokenizer, VOCAB + 2))
    scores = processor(torch.tensor([[5]]), torch.zeros(1, VOCAB + 2))
    assert scores[0].isinf().nonzero().flatten().tolist() == [gap, VOCAB, VOCAB + 1]


@pytest.mark.parametrize("mode", ["eagle", "medusa"])
def test_trained_heads_draft_for_a_padded_target(mode):
    loaded = HFModel.load("inferlab/tiny", device="cpu", dtype="float32")
    with loaded.plain() as plain:
        model = copy.deepcopy(plain)
    model.resize_token_embeddings(model.config.vocab_size + 64, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[-64:] = 1.0
    padded = HFModel(model.eval(), loaded.tokenizer)
    results = [
        SpeculativePipeline(
            target=target, draft_mode=mode, controller="fixed", kv_memory_mb=32
        ).generate("import os", 24)
        for target in (loaded, padded)
    ]
    assert results[0]["token_ids"] == results[1]["token_ids"]
    assert results[1]["mean_accepted_length"] == results[0]["mean_accepted_length"] > 2
