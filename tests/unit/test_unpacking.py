"""Checkpoints that come quantized: read as the dense weights that they stand for."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.rounded_checkpoints import LAYOUTS, PACKED, WIDE, gptq, set_config, write_checkpoint
from helpers.tiny_models import tiny_tokenizer
from inferlab import SpeculativePipeline
from inferlab.kernels import unpack
from inferlab.models import (
    HFModel,
    ModelLoadError,
    ModelTooLargeError,
    UnsupportedArchitectureError,
)
from inferlab.models.quantized import QuantizedLinear


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


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_products_take_stays_packed(layout, dtype, tmp_path):
    written, packing = PACKED[layout]
    dense = write_checkpoint(tmp_path, written)
    target = HFModel.load(tmp_path, device="cpu", dtype=dtype)
    linears = {
        name: module
        for name, module in target.model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    rounded = {name.removesuffix(".weight") for name in dense if "_proj" in name}
    assert linears.keys() == rounded
    for name, linear in linears.items():
        assert (linear.bits, linear.group, linear.zeros) == packing
        assert (linear.order is not None) == ("by activation" in layout)
        assert torch.equal(unpack(linear.packed), dense[f"{name}.weight"]), name
    method = written[1]["quant_method"]
    assert target.quantization == method
    assert f"as they come from {method}" in target.load_notes[0]
    # On request all is dense, and packing it anew begins with that.
    unpacked = HFModel.load(tmp_path, device="cpu", dtype=dtype, quantization="dense")
    found = unpacked.model.state_dict()
    for name, weight in dense.items():
        assert torch.equal(found[name], weight.to(dtype)), name
    anew = HFModel.load(tmp_path, device="cpu", dtype=dtype, quantization="int8")
    assert anew.quantization == "int8"


@pytest.mark.parametrize("layout", ["gptq", "gptq, by activation", "packed 4", "packed 8"])
def test_packed_ones_decode_as_modules_would_and_can_be_saved(layout, tmp_path):
    written, _ = PACKED[layout]
    write_checkpoint(tmp_path / "model", written, "qwen2")
    target = HFModel.load(tmp_path / "model", device="cpu", engine="native")
    target.model.save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    again = HFModel.load(tmp_path / "saved", device="cpu", engine="hf")
    assert again.quantization == target.quantization == written[1]["quant_method"]
    for key, tensor in target.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], tensor)
    plain, drafted, modules = (
        SpeculativePipeline(target=model, draft_mode=mode).generate("abab", max_tokens=16)
        for model, mode in ((target, "none"), (target, "ngram"), (again, "none"))
    )
    assert plain["token_ids"] == drafted["token_ids"] == modules["token_ids"]


def test_modules_that_are_no_linears_are_refused(tmp_path):
    written, _ = PACKED["gptq"]
    write_checkpoint(tmp_path / "model", written)
    HFModel.load(tmp_path / "model", device="cpu").model.save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    modules = config["quantization_config"]["modules"]
    for wrong, message in (
        (modules | {"model.layers.0": [4, 32, True, False]}, "model.layers.0 is packed, and Llama"),
        (modules | {"lm_head": [4, 32, True]}, r"lm_head is packed as \[4, 32, True\]; it must"),
        (modules | {"lm_head": [4, 48, True]}, r"lm_head is packed as \[4, 48, True\]; it must"),
        (modules | {"lm_head": [4]}, r"lm_head is packed as \[4\]; it must"),
        (modules | {"lm_head": 3}, "lm_head is packed as 3"),
    ):
        config["quantization_config"]["modules"] = wrong
        file.write_text(json.dumps(config))
        with pytest.raises(ModelLoadError, match=message):
            HFModel.load(tmp_path / "saved", device="cpu")


def test_orders_that_are_damaged_or_not_told_of_are_refused(tmp_path):
    write_checkpoint(tmp_path / "model", PACKED["gptq, by activation"][0])
    HFModel.load(tmp_path / "model", device="cpu").model.save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    weights, file = tmp_path / "saved" / "model.safetensors", tmp_path / "saved" / "config.json"
    stored, name = load_file(weights), "model.layers.1.mlp.down_proj"
    order = stored[f"{name}.order"]
    for wrong in (order * 0, order - 1, order.long()):
        save_file(stored | {f"{name}.order": wrong}, weights, {"format": "pt"})
        with pytest.raises(ModelLoadError, match=rf"{name}.order is no order of 96 inputs"):
            HFModel.load(tmp_path / "saved", device="cpu")
    save_file(stored, weights, {"format": "pt"})
    config = json.loads(file.read_text())
    modules = config["quantization_config"]["modules"]
    modules[name] = [*modules[name][:3], False]
    file.write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=rf"{name}.order is there, and its config says of no"):
        HFModel.load(tmp_path / "saved", device="cpu")


@pytest.mark.parametrize(
    ("layout", "key", "change", "message"),
    [
        ("gptq, by activation", "g_idx", lambda g: g - 1, "g_idx must be the group of each input"),
        ("packed 4, by activation", "weight_g_idx", lambda g: g - 1, "weight_g_idx must be the"),
        ("gptq", "g_idx", lambda g: g[None], "g_idx must be the group of each input"),
        ("gptq", "g_idx", lambda g: g[:0], None),
    ],
)
def test_groups_of_inputs_that_cannot_be_are_named(layout, key, change, message, tmp_path):
    dense = write_checkpoint(tmp_path, PACKED[layout][0])
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    changed = {k: change(v).contiguous() for k, v in stored.items() if k.endswith(f".{key}")}
    save_file(stored | changed, file, {"format": "pt"})
    if message is None:
        found = dict(HFModel.load(tmp_path, device="cpu").model.named_modules())
        for name in dense:
            if isinstance(linear := found.get(name.removesuffix(".weight")), QuantizedLinear):
                assert torch.equal(unpack(linear.packed), dense[name])
        return
    with pytest.raises(ModelLoadError, match=message):
        HFModel.load(tmp_path, device="cpu")


def test_one_layer_that_products_do_not_take_is_dense(tmp_path):
    dense = write_checkpoint(tmp_path, gptq(4, group=WIDE))
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.down_proj"
    stored = load_file(file)
    stored[f"{name}.g_idx"][0] = stored[f"{name}.g_idx"][-1]  # groups of different sizes
    save_file(stored, file, {"format": "pt"})
    modules = dict(HFModel.load(tmp_path, device="cpu").model.named_modules())
    assert type(modules[name]) is torch.nn.Linear
    assert isinstance(modules["model.layers.0.mlp.up_proj"], QuantizedLinear)
    assert modules[name].weight.shape == dense[f"{name}.weight"].shape


def test_projections_in_orders_of_their_own_run_by_modules(tmp_path):
    write_checkpoint(tmp_path, PACKED["gptq, by activation"][0])
    file, name = tmp_path / "model.safetensors", "model.layers.0.self_attn.k_proj"
    stored = load_file(file)
    before = SpeculativePipeline(base_model=str(tmp_path), draft_mode="none")
    assert before.target.engine == "native"
    stored[f"{name}.g_idx"] = stored[f"{name}.g_idx"].flip(0).contiguous()
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(UnsupportedArchitectureError, match=r"projections of .* have different"):
        HFModel.load(tmp_path, device="cpu", engine="native")
    after = SpeculativePipeline(base_model=str(tmp_path), draft_mode="ngram")
    assert after.target.engine == "hf"
    assert after.target.quantization == "gptq"
    assert after.generate("abab", max_tokens=8)["num_tokens"] == 8


def test_memory_that_is_allowed_is_that_of_the_weights_as_they_are(tmp_path):
    write_checkpoint(tmp_path, gptq(4, group=WIDE))
    limit = 0.9 * (tmp_path / "model.safetensors").stat().st_size / 2**20 + 0.1
    HFModel.load(tmp_path, device="cpu", max_memory_mb=limit)
    with pytest.raises(ModelTooLargeError, match=r"MB of gptq weights, over max_memory_mb = "):
        HFModel.load(tmp_path, device="cpu", max_memory_mb=0.05)


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
