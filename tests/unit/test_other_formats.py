"""Weights of 8 and 4 bits by bitsandbytes and torchao, and what must not touch them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.tiny_models import tiny_model, tiny_tokenizer
from inferlab import SpeculativePipeline
from inferlab.models import BUNDLED, HFModel, ModelLoadError, other_formats

FORMATS = ("bnb-8bit", "bnb-4bit", "torchao-int8")  # that run on a CPU
TINY = BUNDLED["inferlab/tiny"]


@pytest.fixture(scope="module", params=FORMATS)
def target(request):
    pytest.importorskip(other_formats.PACKAGES[request.param])
    # fp32: no two logits are the same, as they are in bf16.
    return HFModel.load("inferlab/tiny", device="cpu", dtype="float32", quantization=request.param)


def test_they_decode_what_transformers_does_and_say_so(target):
    pipeline = SpeculativePipeline(target=target, draft_mode="none")
    result = pipeline.generate("class Stack:", max_tokens=16)
    assert target.num_parameters == HFModel.load("inferlab/tiny").num_parameters
    assert f"{target.quantization} weights" in result["dtype"]
    config = other_formats.settings_of(target.quantization, torch.float32, torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    ids = AutoTokenizer.from_pretrained(TINY)("class Stack:", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=16, do_sample=False)[0]
    assert result["token_ids"] == expected[ids.input_ids.shape[1] :].tolist()


def test_they_are_drafted_for(target):
    result = SpeculativePipeline(target=target, draft_model="inferlab/tiny-draft", K=4).generate(
        "class Stack:", max_tokens=32
    )
    assert result["num_tokens"] == 32
    assert result["mean_accepted_length"] > 1.5


def test_a_draft_model_has_a_format_of_its_own():
    pytest.importorskip("bitsandbytes")
    pipeline = SpeculativePipeline(draft_quantization="bnb-4bit", K=4)
    plain = SpeculativePipeline(target=pipeline.target, draft_mode="none")
    drafted, expected = (p.generate("import os", max_tokens=32) for p in (pipeline, plain))
    assert drafted["token_ids"] == expected["token_ids"]
    assert drafted["mean_accepted_length"] > 1.5


def test_a_checkpoint_that_holds_them_loads(target, tmp_path):
    with target.plain() as model:
        model.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    again = HFModel.load(tmp_path, device="cpu")
    assert again.quantization == other_formats.PACKAGES[target.quantization]
    texts = [
        SpeculativePipeline(target=each, draft_mode="none").generate("def f(", max_tokens=12)
        for each in (target, again)
    ]
    assert texts[0]["token_ids"] == texts[1]["token_ids"]
    with pytest.raises(ModelLoadError, match="its weights come quantized; leave quantization out"):
        HFModel.load(tmp_path, device="cpu", quantization="bnb-8bit")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(other_formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'bnb-4bit', which bitsandbytes makes.*pip install"):
        HFModel.load("inferlab/tiny", device="cpu", quantization="bnb-4bit")


def test_four_bits_of_torchao_are_of_cuda():
    with pytest.raises(ValueError, match=r"torchao-int4.*choose 'int4' or 'bnb-4bit'"):
        HFModel.load("inferlab/tiny", device="cpu", quantization="torchao-int4")


def test_a_model_whose_weights_are_no_plain_numbers_runs_its_own_products():
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model("llama", dtype=torch.bfloat16)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="not all there as plain numbers"):
        HFModel(model, tiny_tokenizer(), engine="native")
    target = HFModel(model, tiny_tokenizer())
    assert SpeculativePipeline(target=target, draft_mode="ngram").generate("ab")["num_tokens"] > 0
