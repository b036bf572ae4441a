"""Targets with packed weights: speculation gives the tokens of their own plain decoding."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from helpers.decoding import GREEDY, PENALISED, PROMPTS, SAMPLED, engine_of
from helpers.pairwise import pairwise
from helpers.tiny_models import FAMILIES, MIXTURES, tiny_model
from inferlab import SpeculativePipeline
from inferlab.config import ConfigError
from inferlab.models import EarlyExit, FakeLM, ForwardBatch, HFModel, format_of
from inferlab.models.experts import is_experts
from inferlab.models.quantized import FORMATS, QuantizedLinear, check_format, quantize
from inferlab.specdec.cost_cache import model_facts


@cache
def quantized(family: str, quantization: str) -> HFModel:
    model = tiny_model(family)
    quantize(model, quantization)
    return HFModel(model)


def logits_of(model: HFModel, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens])
    none = torch.zeros(1, dtype=torch.int32)
    pages = torch.arange(4, dtype=torch.int32)[None]
    batch = ForwardBatch(ids, torch.arange(len(tokens))[None], none, pages)
    return model.forward(batch, model.new_cache(4)).logits[0]


@pairwise(
    family=[*FAMILIES, *MIXTURES],
    quantization=list(FORMATS),
    drafter=["vanilla", "ngram"],
    tree={"chain": False, "tree": True},
    params={"greedy": GREEDY, "sampled": SAMPLED, "penalised": PENALISED},
)
def test_speculation_changes_no_token(family, quantization, drafter, tree, params):
    target = quantized(family, quantization)
    asked = [(prompt, params) for prompt in PROMPTS]
    plain = [r.token_ids for r in engine_of(target, "none", False, 1).generate(asked)]
    for batch in (1, 5):
        results = engine_of(target, drafter, tree, batch).generate(asked)
        assert [r.token_ids for r in results] == plain


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
@pytest.mark.parametrize("quantization", FORMATS)
def test_logits_are_those_of_the_model_with_the_unpacked_weights(family, quantization):
    """But for the inputs of products, which are rounded to 8 bits."""
    target = quantized(family, quantization)
    packed = [m for m in target.model.modules() if isinstance(m, QuantizedLinear)]
    assert len(packed) >= 4
    assert not any(type(m) is nn.Linear or is_experts(m) for m in target.model.modules())
    own = logits_of(target, PROMPTS[0])
    with target.plain() as model, torch.inference_mode():
        modules = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0]
    spread = float(own.float().std())
    assert (own - modules).abs().max() <= 0.06 * spread  # roundings fall elsewhere
    original = HFModel(tiny_model(family))
    far = (own - logits_of(original, PROMPTS[0])).square().mean().sqrt()
    limit = 0.1 if quantization == "int8" else 0.6
    assert far <= limit * spread * (3 if family in MIXTURES else 1)  # other experts for some rows
    assert target.num_parameters == original.num_parameters


@pytest.mark.parametrize("mode", ["vanilla", "ngram", "eagle", "medusa", "self", "recycling"])
@pytest.mark.parametrize("quantization", FORMATS)
def test_every_drafter_of_the_bundled_models_agrees_with_plain_decoding(mode, quantization):
    settings = {"quantization": quantization, "dtype": "bfloat16", "cost_cache": False}
    plain = SpeculativePipeline(draft_mode="none", **settings)
    pipeline = SpeculativePipeline(
        draft_mode=mode, k=3, target=plain.target, draft_quantization="int8", **settings
    )
    prompts = ["def add(a, b):\n", "class Point:\n    def __init__(self", "import os\nimport"]
    for sampling in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 3}):
        expected = [r["token_ids"] for r in plain.generate(prompts, 24, **sampling)]
        results = pipeline.generate(prompts, 24, **sampling)
        assert [r["token_ids"] for r in results] == expected
    assert sum(r["accepted"] for r in results) > 0
    assert results[0]["dtype"] == f"bfloat16, {quantization} weights"


def test_a_head_that_shares_the_embeddings_weight_gets_one_of_8_bits():
    model = HFModel.load("inferlab/tiny", quantization="int4", dtype="bfloat16")
    assert model.head.bits == 8
    assert {m.bits for m in model.model.model.modules() if isinstance(m, QuantizedLinear)} == {4}
    assert model.embed.weight.dtype == torch.bfloat16
    assert format_of(model) == "bfloat16, int4 weights"
    assert EarlyExit(model, 2).num_parameters < model.num_parameters == 5084320


@pytest.mark.parametrize("quantization", FORMATS)
def test_what_is_written_to_a_bias_later_counts(quantization):
    model = tiny_model("qwen2")
    quantize(model, quantization)
    target = HFModel(model)
    before = logits_of(target, PROMPTS[0])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias.add_(3.0)
    changed = tiny_model("qwen2")
    with torch.no_grad():
        for layer in changed.model.layers:
            layer.self_attn.v_proj.bias.add_(3.0)
    quantize(changed, quantization)
    after = logits_of(target, PROMPTS[0])
    assert not torch.equal(after, before)
    assert torch.equal(after, logits_of(HFModel(changed), PROMPTS[0]))


def test_a_packed_module_takes_what_a_linear_one_takes():
    linear = nn.Linear(40, 20)
    packed = QuantizedLinear.of(linear, "int8")
    for x in (torch.randn(0, 40), torch.randn(2, 0, 40), torch.randn(40, 6).t(), torch.randn(40)):
        out = packed(x)
        assert out.shape == linear(x).shape
        assert torch.allclose(out, linear(x), atol=0.05)
    with pytest.raises(ValueError, match=r"x has shape \[2, 64\]; the weight is packed for 40"):
        packed(torch.randn(2, 64))
    assert packed.half().weight.dtype == torch.float16
    with torch.no_grad():
        linear.weight[0, 0] = -65504
    assert QuantizedLinear.of(linear.half(), "int4").weight.isfinite().all()


def test_a_model_that_cannot_be_packed_stays_as_it_was():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"model\.layers\.2\.mlp\.down_proj has weights that are NaN"
    ):
        quantize(model, "int8")
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    model = tiny_model("llama")
    wrapped = HFModel(model)
    quantize(model, "int8")
    wrapped.notice_changes()
    assert wrapped.quantization == "int8"
    with pytest.raises(ValueError, match="quantization is 'int4', but the model is int8 already"):
        quantize(model, "int4")


def test_costs_of_one_format_are_not_those_of_another():
    facts = [model_facts(quantized("llama", q)) for q in FORMATS]
    assert facts[0] != facts[1]


def test_what_cannot_be_packed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="quantization is 'int3'; it must be 'int8' or 'int4'"):
        HFModel.load("inferlab/tiny", quantization="int3")
    with pytest.raises(ValueError, match=r"of CPUs, and the model is on cuda; choose device 'cpu'"):
        check_format("int8", torch.device("cuda"))
    with pytest.raises(ConfigError, match="quantization: 'int9'"):
        SpeculativePipeline(quantization="int9")
    with pytest.raises(ConfigError, match="quantization: 'int8' is not for implementation: 'fake'"):
        SpeculativePipeline(implementation="fake", quantization="int8")
    loaded = HFModel.load("inferlab/tiny")
    with pytest.raises(ValueError, match=r"quantization is 'int8', but a model was given that is"):
        SpeculativePipeline(target=loaded, quantization="int8")
    with pytest.raises(ValueError, match=r"draft_quantization is 'int4', but a model was given"):
        SpeculativePipeline(target=loaded, draft=FakeLM(), draft_quantization="int4")
