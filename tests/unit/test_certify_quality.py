"""Tables of quality: the perplexity of a text by a sliding window, KL, agreement, intervals."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.tiny_models import tiny_model, tiny_tokenizer
from inferlab import SpeculativePipeline
from inferlab.benchmarks.perplexity import (
    log_probabilities,
    perplexity,
    text_log_probabilities,
    text_rows,
)
from inferlab.certify.quality import certify_quality
from inferlab.models import HFModel

IDS = [5, 9, 12, 7, 33, 21, 8, 40, 3, 17, 26]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", seed=3).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


# --- the sliding window -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "stride"), [(2, 1), (4, 1), (4, 3), (5, 2), (11, 5), (10, 9), (64, 32)]
)
def test_every_token_is_predicted_once_with_enough_before_it(model, window, stride):
    found = text_log_probabilities(model, IDS, window, stride)
    assert len(found) == len(IDS) - 1
    begin = seen = 0  # written out: which window predicts which token
    for index, value in enumerate(found, start=1):
        if index > seen:
            if seen:
                begin = max(min(begin + window, len(IDS)) + stride - window, begin + 1)
            seen = min(begin + window, len(IDS)) - 1
        expected = log_probabilities(model, IDS[begin:index], [IDS[index]])[0]
        assert value == pytest.approx(expected, abs=1e-4)
        assert index - begin >= min(index, window - stride)


def test_a_window_of_the_whole_text_is_its_perplexity(model):
    whole = log_probabilities(model, IDS[:1], IDS[1:])
    assert text_log_probabilities(model, IDS, 11, 5) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    ("ids", "window", "stride", "message"),
    [
        ([1], 4, 2, "ids has 1 tokens"),
        (IDS, 4, 4, "stride is 4"),
        (IDS, 4, 0, "stride is 0"),
        (IDS, 1, 1, "stride is 1"),
    ],
)
def test_windows_that_cannot_be(model, ids, window, stride, message):
    with pytest.raises(ValueError, match=message):
        list(text_rows(model, ids, window, stride))


# --- the table ----------------------------------------------------------------------------------

TEXT = "the quick brown fox jumps over the lazy dog " * 12


def table(folder, **changed):
    return certify_quality(
        {
            "config": {"base_model": folder, "draft_mode": "ngram"},
            "policies": [],
            "quantizations": [],
            "dtypes": [],
            "prompts": ["the quick", "lazy dog"],
            "max_tokens": 8,
            "text": TEXT,
            "window": 48,
            "stride": 24,
            "max_kl": None,
            **changed,
        }
    )


def rows_of(certificate):
    return {row["variant"]: row for row in certificate["rows"]}


def test_figures_are_those_of_the_models(folder):
    found = table(folder, dtypes=["bfloat16"], policies=["longest_prefix", "typical"])
    rows = rows_of(found)
    assert list(rows) == ["reference", "longest_prefix", "typical p 0.9", "bfloat16"]
    target, other = HFModel.load(folder), HFModel.load(folder, dtype="bfloat16")
    ids = target.tokenizer.encode(TEXT)
    assert found["text_tokens"] == len(ids)
    with target.plain() as one, other.plain() as two:
        expected = perplexity(text_log_probabilities(one, ids, 48, 24))
        theirs = [
            (a.double().log_softmax(-1), b.double().log_softmax(-1))
            for (a, _), (b, _) in zip(
                text_rows(one, ids, 48, 24), text_rows(two, ids, 48, 24), strict=True
            )
        ]
    p, q = (torch.cat(side) for side in zip(*theirs, strict=True))
    reference, half = rows["reference"], rows["bfloat16"]
    assert reference["text_perplexity"]["value"] == pytest.approx(expected, rel=1e-5)
    assert reference["kl"]["value"] == 0
    assert reference["top1"]["value"] == reference["same_outputs"]["value"] == 1
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert half["kl"]["value"] == pytest.approx(kl, rel=1e-4)
    assert half["top1"]["value"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    for estimate in (reference["text_perplexity"], half["kl"], half["top1"]):
        low, high = estimate["interval"]
        assert low <= estimate["value"] <= high
    lossless = rows["longest_prefix"]
    assert lossless["same_outputs"]["value"] == 1
    assert lossless["output_perplexity"] == reference["output_perplexity"]
    assert lossless["kl"]["value"] is None
    assert rows["typical p 0.9"]["output_perplexity"]["value"] > 1


def test_perplexity_of_outputs_is_the_references(folder):
    (row,) = table(folder)["rows"]
    plain = SpeculativePipeline(base_model=folder, draft_mode="none")
    prompts = ["the quick", "lazy dog"]
    outputs = [result["token_ids"] for result in plain.generate(prompts, max_tokens=8)]
    losses = []
    with plain.target.plain() as model:
        for prompt, new in zip(prompts, outputs, strict=True):
            losses += log_probabilities(model, plain.encode(prompt), new)
    expected = math.exp(-sum(losses) / len(losses))
    assert row["output_perplexity"]["value"] == pytest.approx(expected, rel=1e-5)


def test_a_limit_on_kl_decides(folder):
    assert table(folder, dtypes=["bfloat16"], max_kl=1.0)["certified"]
    strict = table(folder, dtypes=["bfloat16"], max_kl=1e-12)
    assert not strict["certified"]
    assert strict["summary"].endswith("KL above 1e-12: bfloat16")


def test_a_text_of_one_token_is_refused(folder):
    with pytest.raises(ValueError, match="at least two"):
        table(folder, text="the")
