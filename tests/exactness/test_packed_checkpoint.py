"""Packed models on disk: what is read is what was written, and nothing else is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.decoding import PROMPTS
from helpers.tiny_models import FAMILIES, MIXTURES, VOCAB, tiny_model, tiny_tokenizer
from inferlab import cli
from inferlab.models import HFModel
from inferlab.models.linear_inputs import Inputs
from inferlab.models.loading import ModelLoadError, ModelTooLargeError
from inferlab.models.packed_checkpoint import save_packed
from inferlab.models.quantized import FORMATS, LINEARS, count_weights, num_parameters, quantize


def saved(folder: Path, family: str, format_: str):
    model = tiny_model(family)
    tied = bool(model.config.tie_word_embeddings)
    quantize(model, format_)
    save_packed(model, tiny_tokenizer(model.config.vocab_size), folder, tied=tied)
    return model


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
@pytest.mark.parametrize("format_", FORMATS)
def test_what_is_read_is_what_was_written(tmp_path, family, format_):
    model = saved(tmp_path / "model", family, format_)
    read = HFModel.load(tmp_path / "model", dtype="float32")
    assert read.quantization == format_
    assert f": {num_parameters(model) / 1e6:.1f} M parameters" in read.load_notes[0]
    assert num_parameters(read.model) == num_parameters(model)
    state = read.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
        assert state[name].dtype == tensor.dtype
    ids = torch.tensor([PROMPTS[0]])
    with read.plain() as plain, torch.inference_mode():
        plain.set_attn_implementation("eager")
        assert torch.equal(plain(ids).logits, model(ids).logits)


def test_all_commands_read_it(tmp_path, capsys):
    folder = tmp_path / "packed"
    words = ["quantize", "inferlab/tiny", "--format", "int8", "--output", str(folder)]
    assert cli.main(words) == 0
    assert "weights rounded to int8 to nearest · 9.7 MB, now 7.0 MB" in capsys.readouterr().out
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}
    ask = ["--prompt", "class Stack:", "--max-tokens", "12", "--json"]
    texts = []
    for model in (["--base-model", str(folder)], ["--quantization", "int8"]):
        assert cli.main(["specdec", *model, *ask]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["text"] == texts[1]["text"]
    assert texts[0]["dtype"] == texts[1]["dtype"] == "bfloat16, int8 weights"
    assert cli.main(["baseline", "--model", str(folder), *ask]) == 0


def test_files_that_are_not_as_written_are_refused(tmp_path):
    folder = tmp_path / "model"
    saved(folder, "llama", "int4")
    file, config = folder / "model.safetensors", folder / "config.json"
    whole, written = file.read_bytes(), json.loads(config.read_text())

    def load_with(**changes):
        facts = {**written["quantization_config"], **changes}
        config.write_text(json.dumps({**written, "quantization_config": facts}))
        return HFModel.load(folder)

    for at in (len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ModelLoadError, match=r"model\.safetensors is damaged"):
            load_with()
    file.write_bytes(whole)
    assert load_with().quantization == "int4"
    for changes, message in (
        (
            {"version": 4},
            "packed in version 4 of the layout, and this inferlab reads version 3 and",
        ),
        ({"format": "int3"}, "format is 'int3'; known are 'int8', 'int4'"),
        ({"sha256": {"model.safetensors": "0" * 64}}, "is damaged"),
        ({"sha256": 3}, "sha256 is 3; it must be a mapping"),
    ):
        with pytest.raises(ModelLoadError, match=message):
            load_with(**changes)
    assert load_with(sha256={}).quantization == "int4", "nothing is compared"
    with pytest.raises(ModelTooLargeError, match=r"int4 weights, over max_memory_mb = 0\.01"):
        HFModel.load(folder, max_memory_mb=0.01)
    with pytest.raises(ValueError, match="quantization is 'int8', but the model is int4 already"):
        HFModel.load(folder, quantization="int8")


def test_what_transformers_saves_again_is_read(tmp_path):
    saved(tmp_path / "model", "llama", "int8")
    read = HFModel.load(tmp_path / "model")
    with read.plain() as plain:
        plain.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    read.tokenizer.save_pretrained(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    again = HFModel.load(tmp_path / "again")
    for name, tensor in read.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_an_empty_directory_is_written_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "source" / "model", "llama", "int8")
    tiny = tiny_model("llama")
    tiny.save_pretrained(tmp_path / "plain")
    tiny_tokenizer(tiny.config.vocab_size).save_pretrained(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "file").write_text("a")
    words = ["quantize", str(tmp_path / "plain"), "--format", "int8", "--output"]
    assert cli.main([*words, "link"]) == 0
    assert HFModel.load(tmp_path / "empty").quantization == "int8"
    assert cli.main([*words, "file/x"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "none.jsonl").write_text('{"prompt": ""}\n')
    assert cli.main([*words, "new", "--calibration", "none.jsonl"]) == 2
    assert "none.jsonl has no tokens" in capsys.readouterr().err


def test_texts_on_which_a_model_overflows_are_refused():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.mul_(1e30)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.\w+ is given numbers .* not finite"):
        quantize(model, "int4", [[5, 6, 7]])


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    model = tiny_model("llama")
    quantize(model, "int8")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_packed(model, None, tmp_path / "model", tied=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--calibration-tokens", "9"), "--calibration-tokens: is of --calibration"),
        (("--calibration", "nowhere.txt"), "--calibration: nowhere.txt cannot be read: No such"),
        (("--output", "."), "is there already; name a new or an empty directory"),
        (("--max-memory-mb", "1"), "MODEL: inferlab/tiny: 5.1 M parameters in bfloat16 need"),
    ],
)
def test_flags_that_make_no_sense(capsys, words, message):
    given = ["quantize", "inferlab/tiny", "--format", "int8", "--output", "new", *words]
    assert cli.main(given) == 2
    assert message in capsys.readouterr().err


# --- roundings that make up for each other ------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_compensated_weights_leave_less_error(family):
    texts = [[(7 * i + n * n) % (VOCAB - 2) + 2 for n in range(40)] for i in range(6)]
    ids = torch.tensor(texts)
    errors = []
    with torch.inference_mode():
        exact = tiny_model(family)(ids).logits
        for calibration in ((), texts):
            model = tiny_model(family)
            counted: list[int] = []
            quantize(model, "int4", calibration, counted.append)
            assert sum(counted) == count_weights(tiny_model(family))
            errors.append(float((model(ids).logits - exact).square().mean()))
    assert errors[1] < errors[0], "on the texts that they were rounded for"


class Experts(nn.Module):
    """The second runs for even first tokens only."""

    def __init__(self):
        super().__init__()
        self.gate, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.last = nn.Linear(4, 4)
        self.ran = 0

    def forward(self, input_ids, use_cache):
        x = self.gate(nn.functional.one_hot(input_ids % 4, 4).float())
        x = self.experts[int(input_ids[0, 0] % 2)](x)
        x = self.last(x)
        self.ran += 1
        return x


def test_moments_are_those_of_all_that_a_module_was_given():
    model = Experts()
    texts = [[0, 1, 2], [1, 2, 3, 3], [2, 2], [3, 0, 1]]
    modules = [module for module in model.modules() if type(module) in LINEARS]
    inputs = Inputs(model, texts)
    parts = inputs.in_parts(modules)
    assert parts == [[model.idle, model.experts[1]], [model.gate, model.experts[0], model.last]]
    found = inputs.moments(modules)
    assert set(found) == set(modules) - {model.idle}
    seen: dict[nn.Module, list[torch.Tensor]] = {module: [] for module in found}
    for module in seen:
        module.register_forward_pre_hook(lambda m, args: seen[m].append(args[0][0]))
    for text in texts:
        model(torch.tensor([text]), use_cache=False)
    for module, rows in seen.items():
        x = torch.cat(rows)
        assert torch.allclose(found[module], x.T @ x, atol=1e-5)


def test_what_lies_behind_the_last_module_is_not_run():
    model = Experts()
    inputs = Inputs(model, [[0, 1], [2, 3]])
    inputs.moments([model.gate])
    assert model.ran == 1, "of the first text, which says what is the last"
