"""Checkpoints that come quantized: read as the dense weights that they stand for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.rounded_checkpoints import LAYOUTS, set_config, write_checkpoint
from helpers.tiny_models import tiny_tokenizer
from inferlab import SpeculativePipeline
from inferlab.models import HFModel, ModelLoadError


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_what_the_layout_says(layout, tmp_path):
    dense = write_checkpoint(tmp_path, layout)
    for dtype in (torch.float32, torch.bfloat16):
        target = HFModel.load(tmp_path, device="cpu", dtype=dtype)
        found = target.model.state_dict()
        assert found.keys() == dense.keys()
        for name, weight in dense.items():
            assert torch.equal(found[name], weight.to(dtype)), name
    method = LAYOUTS[layout][1]["quant_method"]
    assert f"unpacked from {method}" in target.load_notes[0]


@pytest.mark.parametrize("family", ["qwen2", "opt"])  # with biases
def test_biases_stay(family, tmp_path):
    dense = write_checkpoint(tmp_path, "gptq 4", family)
    found = HFModel.load(tmp_path, device="cpu").model.state_dict()
    for name, weight in dense.items():
        assert torch.equal(found[name], weight), name


def test_it_decodes_as_the_dense_checkpoint_and_is_packed_anew(tmp_path):
    write_checkpoint(tmp_path / "awq", "awq")
    model = HFModel.load(tmp_path / "awq", device="cpu").model
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    for quantization in ("none", "int8"):
        rounded, dense = (
            SpeculativePipeline(
                base_model=str(tmp_path / name), draft_mode="ngram", quantization=quantization
            ).generate("abab", max_tokens=12)
            for name in ("awq", "dense")
        )
        assert rounded["token_ids"] == dense["token_ids"]


def test_what_the_checkpoint_says_of_decoding_is_kept(tmp_path):
    write_checkpoint(tmp_path, "fp8")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert HFModel.load(tmp_path, device="cpu").eos_token_ids == (1, 7)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("gptq 4", {"checkpoint_format": "marlin"}, "gptq weights are in the layout 'marlin'"),
        ("awq", {"version": "gemv"}, "awq weights are in the layout 'gemv'; read are gemm"),
        ("packed 4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        ("packed 4", {"transform_config": {"config_groups": {"R1": {}}}}, "behind transforms"),
    ],
)
def test_forms_that_are_not_read_are_named(layout, change, message, tmp_path):
    write_checkpoint(tmp_path, layout)
    set_config(tmp_path, LAYOUTS[layout][1] | change)
    with pytest.raises(ModelLoadError, match=message):
        HFModel.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("layout", "part", "message"),
    [
        ("gptq 4", "scales", r"model\.layers\.0\.mlp\.down_proj has no scales"),
        ("awq", "scales", r"has no scales"),
        ("packed 4", "weight_shape", r"has no weight_shape"),
    ],
)
def test_parts_that_are_missing_are_named(layout, part, message, tmp_path):
    write_checkpoint(tmp_path, layout)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    del stored[f"model.layers.0.mlp.down_proj.{part}"]
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(ModelLoadError, match=message):
        HFModel.load(tmp_path, device="cpu")


def test_biases_of_zeros_are_passed_over(tmp_path):
    write_checkpoint(tmp_path, "gptq 4")
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.down_proj.bias"
    stored = load_file(file)
    save_file(stored | {name: torch.zeros(64)}, file, {"format": "pt"})
    HFModel.load(tmp_path, device="cpu")
    save_file(stored | {name: torch.ones(64)}, file, {"format": "pt"})
    with pytest.raises(ModelLoadError, match=f"has no {name}, which is not zero"):
        HFModel.load(tmp_path, device="cpu")


def test_scales_that_do_not_fit_are_named(tmp_path):
    write_checkpoint(tmp_path, "fp8")
    set_config(tmp_path, LAYOUTS["fp8"][1] | {"weight_block_size": [8, 8]})
    with pytest.raises(ModelLoadError, match="scales are too few for a weight"):
        HFModel.load(tmp_path, device="cpu")
