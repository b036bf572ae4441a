"""Loading models: what works, and a clear error for each thing that can be wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from helpers.hub_cache import write_hub_cache
from helpers.paged import PagedRunner
from helpers.tiny_models import CONTEXT, VOCAB, tiny_config, tiny_model, tiny_tokenizer
from inferlab.models import (
    HFModel,
    ModelLoadError,
    ModelTooLargeError,
    UnsupportedArchitectureError,
    resolve_model_path,
)
from inferlab.models.architecture import check_against_plain, trial_pass
from inferlab.models.loading import choose_device, choose_dtype, parse_dtype


def save_model(directory: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(family, dtype=dtype).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


def test_load_a_directory(model_dir: Path) -> None:
    target = HFModel.load(model_dir, device="cpu")
    assert target.name == str(model_dir)
    assert target.vocab_size == VOCAB
    assert target.tokenizer_vocab_size == len(target.tokenizer) == VOCAB
    assert target.context_length == CONTEXT
    assert target.eos_token_ids == (1,)
    assert target.dtype == torch.float32
    assert target.num_parameters == sum(p.numel() for p in tiny_model("llama").parameters())
    assert "float32" in target.load_notes[0]
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        expected = tiny_model("llama")(input_ids=ids).logits
    torch.testing.assert_close(PagedRunner(target).chain(ids.tolist()), expected)


def test_stop_tokens_come_from_the_generation_config(model_dir: Path) -> None:
    file = model_dir / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert HFModel.load(model_dir, device="cpu").eos_token_ids == (1, 7)


def test_dtype_as_asked(model_dir: Path) -> None:
    target = HFModel.load(model_dir, device="cpu", dtype="bf16")
    assert target.dtype == torch.bfloat16
    assert target.new_cache(2).pages[0][0].dtype == torch.bfloat16


def test_auto_dtype() -> None:
    config = tiny_config("llama")
    config.dtype = torch.bfloat16
    assert choose_dtype(None, config)[0] == torch.bfloat16
    assert choose_dtype(torch.float16, config)[0] == torch.float16
    config.dtype = None
    assert choose_dtype(None, config)[0] == torch.float32


def test_device_choice() -> None:
    assert choose_device("auto", ("cpu",)) == torch.device("cpu")
    assert choose_device("auto", ("tpu",)[:0]) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device_priority names 'tpu'.*'cuda', 'mps' and 'cpu'"):
        choose_device("auto", ("tpu", "cpu"))
    with pytest.raises(ValueError, match="device is 'abacus'"):
        choose_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' is not available"):
            choose_device("cuda")


@pytest.mark.parametrize("dtype", ["int8", torch.float64, "float33"])
def test_unknown_dtype(dtype: str | torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"dtype is .* allowed are 'auto', 'float32'"):
        parse_dtype(dtype)


def test_memory_limit_is_checked_before_weights_are_read(model_dir: Path) -> None:
    needed = HFModel.load(model_dir, device="cpu").num_parameters * 4 / 2**20
    HFModel.load(model_dir, device="cpu", max_memory_mb=needed * 1.01)
    (model_dir / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelTooLargeError, match=r"float32 need .* MB, over max_memory_mb = 0\.1"):
        HFModel.load(model_dir, device="cpu", max_memory_mb=0.1)
    assert issubclass(ModelTooLargeError, MemoryError)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist.*inferlab/tiny"):
        HFModel.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        HFModel.load("./nowhere")


def test_file_instead_of_directory(model_dir: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is a file; give the directory"):
        HFModel.load(model_dir / "config.json")


def test_empty_name() -> None:
    with pytest.raises(ValueError, match="model name is empty"):
        HFModel.load(" ")


def test_a_directory_comes_before_bundled_and_hub_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path("gpt2") == "gpt2"
    assert Path(resolve_model_path("inferlab/tiny")).name == "tiny"
    for name in ("gpt2", "inferlab/tiny"):
        Path(name).mkdir(parents=True)
        assert resolve_model_path(name) == Path(name)


def test_no_config(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"no config\.json in"):
        HFModel.load(model_dir)


def test_broken_config(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"the config in .* cannot be used"):
        HFModel.load(model_dir)


def test_unknown_model_type(model_dir: Path) -> None:
    (model_dir / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(ModelLoadError, match="nonesuch"):
        HFModel.load(model_dir)


def test_no_weights(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"no model\.safetensors in"):
        HFModel.load(model_dir)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_weights(model_dir: Path, keep: int) -> None:
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is truncated: \d+ bytes"):
        HFModel.load(model_dir)


def test_weights_that_are_something_else(model_dir: Path) -> None:
    (model_dir / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"hello")
    with pytest.raises(ModelLoadError, match="is not a safetensors file"):
        HFModel.load(model_dir)


def test_missing_shard(model_dir: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=r"lists model-00002-of-00002.*; get it, or delete"):
        HFModel.load(model_dir)


@pytest.mark.parametrize(
    "index", ['{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}', "{"]
)
def test_an_old_index_beside_a_whole_file_counts_for_nothing(model_dir: Path, index: str) -> None:
    (model_dir / "model.safetensors.index.json").write_text(index)
    want = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    weights = HFModel.load(model_dir, device="cpu", dtype="float32").model.state_dict()
    assert all(torch.equal(weights[name], want[name].float()) for name in want)


def test_incomplete_checkpoint(model_dir: Path) -> None:
    """transformers would fill the gap with random numbers and a warning."""
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        HFModel.load(model_dir)


def test_weights_of_another_shape(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config["intermediate_size"] = 80
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="weights could not be read"):
        HFModel.load(model_dir)


def test_pickles_only_when_allowed(model_dir: Path) -> None:
    state = tiny_model("llama").state_dict()
    (model_dir / "model.safetensors").unlink()
    torch.save(state, model_dir / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin, a pickle.*allow_pickle=True"):
        HFModel.load(model_dir)
    assert HFModel.load(model_dir, device="cpu", allow_pickle=True).vocab_size == VOCAB


def test_remote_code_is_not_run(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    config["model_type"] = "nonesuch"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model_dir / "config.json").write_text(json.dumps(config))
    (model_dir / "evil.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ModelLoadError, match="trust_remote_code"):
        HFModel.load(model_dir)


def test_tokenizer_missing(model_dir: Path) -> None:
    for file in model_dir.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelLoadError, match=r"no usable tokenizer in .*tokenizer\.json"):
        HFModel.load(model_dir)


@pytest.mark.parametrize(
    "kind",
    ["bloom", "falcon", "mpt", "gpt_neo", "mamba", "jamba", "t5", "whisper"],
)
def test_architectures_refused_by_name(tmp_path: Path, kind: str) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=rf"'{kind}' .*Tested families: OPT"):
        HFModel.load(tmp_path)


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa", "hy_v4"])
def test_sparse_attention_is_refused_before_weights_are_read(tmp_path: Path, kind: str) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=rf"'{kind}' lets an index choose"):
        HFModel.load(tmp_path)


def test_errors_from_below_are_put_into_words() -> None:
    mask = None
    with (
        pytest.raises(UnsupportedArchitectureError, match="'odd' works on an attention mask or"),
        trial_pass("model", "odd"),
    ):
        mask[:, 0]  # type: ignore[index]


@pytest.mark.parametrize("kind", ["gptj", "codegen"])
def test_architectures_that_came_to_the_attention_interface_later(kind: str) -> None:
    """transformers 5.24 took them there: they are compared with their own attention when loaded."""
    config = AutoConfig.for_model(
        kind,
        vocab_size=64,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        n_ctx=64,
        rotary_dim=8,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config)
    if type(model)._supports_attention_backend:
        assert len(HFModel(model).layers) == 2
    else:
        with pytest.raises(UnsupportedArchitectureError, match=f"'{kind}' does not call"):
            HFModel(model)


def test_multimodal_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("gemma3").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match="'gemma3' is multimodal"):
        HFModel.load(tmp_path)


def _tiny(kind: str, **values: object) -> object:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return AutoConfig.for_model(kind, **{**sizes, **values})


@pytest.mark.parametrize(
    ("kind", "values", "why"),
    [
        ("bert", {}, "is not causal"),
        ("gpt_oss", {"num_local_experts": 2, "head_dim": 32}, "needs s_aux"),
        ("nemotron", {}, "does not hand the arguments of its call on"),
        (
            "xmod",
            {"is_decoder": True},
            r"fails in a short pass .*\(ValueError: Input lang.*in modeling_",
        ),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "only 1 go through"),
        (
            "deepseek_v3",
            {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32},
            "keys and values of one shape",
        ),
    ],
)
def test_attention_that_the_kernels_lack_is_found_by_tracing(
    kind: str, values: dict[str, object], why: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_tiny(kind, **values))
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedArchitectureError, match=why):
        HFModel(model, name=kind)
    assert model.config._attn_implementation == before


def test_half_of_a_routed_models_positions_must_agree() -> None:
    """Rounding sends tokens to other experts, so that some are far off."""
    plain = torch.randn(1, 12, VOCAB, generator=torch.Generator().manual_seed(0))
    some, most = plain.clone(), plain.clone()
    some[0, [3, 7]] += 1
    most[0, 3:] += 1
    check_against_plain(plain, some, "a", "b", routed=True)
    for paged, routed in ((some, False), (most, True), (plain * float("nan"), True)):
        with pytest.raises(UnsupportedArchitectureError, match="gives other logits"):
            check_against_plain(plain, paged, "a", "b", routed=routed)


@pytest.mark.parametrize("kind", ["olmo2", "granite", "cohere", "starcoder2", "mixtral"])
def test_other_families_are_checked_when_they_are_wrapped(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def build() -> HFModel:
        return HFModel(AutoModelForCausalLM.from_config(_tiny(kind, pad_token_id=0)))

    assert build().vocab_size == VOCAB

    def wrong(q: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return torch.zeros_like(q)

    monkeypatch.setattr("inferlab.models.attention_hook.paged_tree_attention", wrong)
    with pytest.raises(UnsupportedArchitectureError, match="other logits on the paged cache"):
        build()


def test_a_switched_model_does_not_run_without_a_step() -> None:
    model = tiny_model("llama")
    target = HFModel(model)
    with pytest.raises(RuntimeError, match=r"called without a step.*plain"):
        model(input_ids=torch.tensor([[1, 2]]))
    with target.plain() as inner:
        assert inner(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, VOCAB)
    with pytest.raises(ValueError, match="already wrapped"):
        HFModel(model)


def test_not_cached_and_offline() -> None:
    with pytest.raises(
        ModelLoadError, match=r"nobody/nothing: .*not in the local hub cache.*hf download nobody"
    ):
        HFModel.load("nobody/nothing")


def test_hub_names_load_from_the_cache(tmp_path: Path) -> None:
    """In a process of its own, as the cache's place is read once, at import."""
    hub = write_hub_cache(tmp_path)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from inferlab.models import HFModel\n"
        "for name in ('facebook/opt-125m', 'distilgpt2', 'sshleifer/tiny-gpt2'):\n"
        "    m = HFModel.load(name, device='cpu')\n"
        "    print(m.name, m.vocab_size, m.tokenizer_vocab_size, m.layers[0].head_dim, m.dtype)\n"
        "blob = Path(sys.argv[1])\n"
        "blob.write_bytes(blob.read_bytes()[:-10])\n"
        "HFModel.load('distilgpt2', device='cpu')\n"
    )
    weights = next(hub.glob("models--distilgpt2/snapshots/*/model.safetensors"))
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", script, str(weights.resolve())],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "facebook/opt-125m 408 400 64 torch.float16",
        "distilgpt2 400 400 64 torch.float16",
        "sshleifer/tiny-gpt2 400 400 1 torch.float16",
    ], done.stderr
    assert done.returncode == 1
    assert re.search(r"ModelLoadError: distilgpt2: .*is truncated", done.stderr)
