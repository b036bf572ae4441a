"""What changes a model without exchanging a module: writes to weights, settings, classes, hooks of
the whole process. Each counts from the next text on, as in `generate`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import LlamaForCausalLM
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

from helpers.compare import generated
from helpers.tiny_models import FAMILIES, tiny_config, tiny_model, tiny_tokenizer
from inferlab.models import HFModel
from inferlab.models.untouched import Snapshot, is_as_written, is_untouched
from inferlab.specdec.pipeline import SpeculativePipeline

NEW_TOKENS = 20
PROMPT = [5, 9, 33, 12, 5, 9, 33, 71, 5, 9]


def decoded(target: HFModel) -> list[int]:
    pipeline = SpeculativePipeline(target=target, draft_mode="ngram", kv_memory_mb=16)
    tokens: list[int] = pipeline.generate(PROMPT, NEW_TOKENS, ignore_eos=True)["token_ids"]
    return tokens


def check_later(model, change: Callable[[nn.Module], object]) -> HFModel:
    """Wraps and uses the model, changes it, and compares with `generate`."""
    target = HFModel(model)
    before = decoded(target)
    change(model)
    with target.plain() as plain:
        expected = generated(plain, PROMPT, NEW_TOKENS)
    assert decoded(target) == expected
    assert expected != before, "the change shows in no token: nothing was tested"
    return target


def conv(model) -> torch.Tensor:
    return model.transformer.h[1].mlp.c_fc.weight


def write_by_data(weight):
    weight.data.mul_(-0.3)


def write_by_numpy(weight):
    weight.detach().numpy().__imul__(-0.3)


def write_to_a_view(weight):
    weight.detach()[:, 1].fill_(9.0)
    weight.detach()[3].fill_(-9.0)


def exchange_data(weight):
    weight.data = -0.3 * weight.data


def exchange_storage(weight):
    weight.data = -0.3 * weight.data.contiguous()


WRITES = (write_by_data, write_by_numpy, write_to_a_view, exchange_data, exchange_storage)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_what_is_written_to_a_turned_weight_counts(write):
    target = check_later(tiny_model("gpt2"), lambda model: write(conv(model)))
    assert conv(target.model).t().is_contiguous()  # and there is no copy of it
    assert conv(target.model).shape == (64, 256)


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
@pytest.mark.parametrize("part", ["q_proj", "o_proj"])
def test_what_is_written_to_a_joint_weight_counts(write, part):
    check_later(
        tiny_model("llama"),
        lambda model: write(getattr(model.model.layers[1].self_attn, part).weight),
    )


def test_a_weight_that_was_rebuilt_between_texts_can_be_written_to():
    target = HFModel(tiny_model("llama"))
    decoded(target)
    attention = target.model.model.layers[1].self_attn
    attention.q_proj.weight = nn.Parameter(attention.q_proj.weight.detach().clone())
    decoded(target)  # joins anew, in the middle of a step
    with torch.no_grad():
        attention.k_proj.weight.mul_(2.0)
    assert not attention.k_proj.weight.is_inference()


def test_weights_made_in_inference_mode_are_turned():
    with torch.inference_mode():
        model = tiny_model("gpt2")
        target = HFModel(model)
    assert conv(model).stride() == (1, 64)

    def exchange(model):
        with torch.inference_mode():
            model.transformer.h[1].mlp.c_fc.weight = nn.Parameter(-conv(model).contiguous())

    decoded(target)
    exchange(model)
    with target.plain() as plain:
        expected = generated(plain, PROMPT, NEW_TOKENS)
    assert decoded(target) == expected
    assert conv(model).stride() == (1, 64)


def test_turned_weights_are_saved_as_they_were(tmp_path):
    model = tiny_model("gpt2")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    HFModel(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert len(saved) > 30
    for name, value in saved.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_that_are_merged_count(family):
    peft = pytest.importorskip("peft")
    target = HFModel(tiny_model(family))
    base = decoded(target)
    names = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=names, fan_in_fan_out=family == "gpt2", init_lora_weights=False
    )
    adapted = peft.get_peft_model(target.model, config).eval()
    seen = [base]
    for change in (
        lambda: None,
        adapted.merge_adapter,
        adapted.unmerge_adapter,
        adapted.merge_and_unload,
    ):
        change()
        tokens = decoded(target)
        with target.plain() as plain:
            assert tokens == generated(plain, PROMPT, NEW_TOKENS)
        seen.append(tokens)
    assert base not in seen[1:]


def shrink(value):
    if isinstance(value, tuple):
        return (shrink(value[0]), *value[1:])
    if isinstance(value, torch.Tensor):
        return value.flip(-1) * 0.2
    for name in ("last_hidden_state", "logits"):
        if getattr(value, name, None) is not None:
            setattr(value, name, getattr(value, name).roll(1, -1))
    return value


PATCHED = (
    ("llama", modeling_llama.LlamaMLP),
    ("llama", modeling_llama.LlamaRMSNorm),
    ("llama", modeling_llama.LlamaDecoderLayer),
    ("llama", modeling_llama.LlamaModel),
    ("llama", modeling_llama.LlamaForCausalLM),
    ("gpt2", modeling_gpt2.GPT2Model),
    ("gpt2", modeling_gpt2.GPT2LMHeadModel),
)


@pytest.mark.parametrize(
    ("family", "kind"), PATCHED, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_wrapped_forward_of_a_class_counts(family, kind, monkeypatch):
    old = kind.forward

    @functools.wraps(old)
    def forward(self, *args, **kwargs):
        return shrink(old(self, *args, **kwargs))

    check_later(tiny_model(family), lambda _: monkeypatch.setattr(kind, "forward", forward))
    assert not is_as_written(kind)
    monkeypatch.undo()
    assert is_as_written(kind)


def test_all_classes_of_the_fused_families_are_as_written():
    for family in FAMILIES:
        target = HFModel(tiny_model(family))
        assert target._fused is not None
        assert all(is_untouched(module) for module in target.model.modules())


def test_functions_and_classes_exchanged_in_the_familys_file_count(monkeypatch):
    old = modeling_llama.apply_rotary_pos_emb

    @functools.wraps(old)
    def rotate(q, k, cos, sin, *args, **kwargs):
        return old(q * 3, k, cos, sin, *args, **kwargs)

    target = check_later(
        tiny_model("llama"),
        lambda _: monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate),
    )
    assert target._fused is None
    monkeypatch.undo()

    class Norm(modeling_qwen3.Qwen3RMSNorm):
        def forward(self, x):
            return super().forward(x) * 3

    monkeypatch.setattr(modeling_qwen3, "Qwen3RMSNorm", Norm)
    model = tiny_model("qwen3")
    expected = generated(model, PROMPT, NEW_TOKENS)
    target = HFModel(model)
    assert target._fused is None
    assert decoded(target) == expected


@pytest.mark.parametrize("before", [False, True])
def test_hooks_on_all_modules_of_the_process_count(before):
    def before_mlp(module, args):
        return (args[0] * -0.2,) if isinstance(module, modeling_llama.LlamaMLP) else None

    def after_mlp(module, args, out):
        return out * -0.2 if isinstance(module, modeling_llama.LlamaMLP) else None

    handles = []

    def register(_):
        if before:
            handles.append(torch_module.register_module_forward_pre_hook(before_mlp))
        else:
            handles.append(torch_module.register_module_forward_hook(after_mlp))

    try:
        target = check_later(tiny_model("llama"), register)
        assert target._fused is None
    finally:
        for handle in handles:
            handle.remove()
    decoded(target)
    assert target._fused is not None


def layers(model):
    return model.model.layers


SETTINGS: dict[str, Callable[[nn.Module], object]] = {
    "scale": lambda m: [setattr(each.self_attn, "scaling", 2.0) for each in layers(m)],
    "epsilon": lambda m: [
        setattr(each.post_attention_layernorm, "variance_epsilon", 50.0) for each in layers(m)
    ],
    "last epsilon": lambda m: (
        setattr(m.model.norm, "variance_epsilon", 1e4)
        or setattr(layers(m)[2].input_layernorm, "variance_epsilon", 1e4)
    ),
    "order": lambda m: (
        setattr(m.model, "layers", nn.ModuleList(reversed(layers(m))))
        or [setattr(each.self_attn, "layer_idx", i) for i, each in enumerate(layers(m))]
    ),
    "fewer": lambda m: (
        setattr(m.model, "layers", layers(m)[:2]) or setattr(m.config, "num_hidden_layers", 2)
    ),
    "call": lambda m: setattr(layers(m)[0].mlp, "_call_impl", lambda x: -x),
    "rotation": lambda m: setattr(m.model.rotary_emb, "attention_scaling", 2.5),
    "head": lambda m: setattr(
        m, "lm_head", nn.Sequential(m.lm_head, nn.Softsign(), nn.Softmin(-1))
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_settings_of_fused_modules_count(family, setting):
    check_later(tiny_model(family), SETTINGS[setting])


LATER: dict[str, tuple[str, Callable[[nn.Module], object]]] = {
    "window of the config": ("mistral", lambda m: setattr(m.config, "sliding_window", 2)),
    "window": ("phi3", lambda m: setattr(m.config, "sliding_window", 2)),
    "soft-cap": (
        "gemma2",
        lambda m: [setattr(each.self_attn, "attn_logit_softcapping", 0.01) for each in layers(m)],
    ),
    "scale": ("gemma3", lambda m: [setattr(each.self_attn, "scaling", 4.0) for each in layers(m)]),
    "head": ("phi3", lambda m: setattr(m, "lm_head", nn.Linear(64, 160, bias=True))),
}


@pytest.mark.parametrize("setting", LATER)
def test_settings_that_were_read_when_the_model_was_traced_count(setting):
    family, change = LATER[setting]
    check_later(tiny_model(family), change)


def test_a_change_to_what_caches_were_made_for_is_refused():
    target = HFModel(tiny_model("llama"))
    pipeline = SpeculativePipeline(target=target, draft_mode="none", kv_memory_mb=16)
    pipeline.generate(PROMPT, 3)
    target.model.to(torch.bfloat16)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"another dtype.*new HFModel"):
            pipeline.generate(PROMPT, 3)
    target.model.to(torch.float32)
    assert len(pipeline.generate(PROMPT, 3, ignore_eos=True)["token_ids"]) == 3


def test_a_head_of_several_modules_works():
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(model.lm_head, nn.Tanh())
    expected = generated(model, PROMPT, NEW_TOKENS)
    target = HFModel(model, tiny_tokenizer())
    assert target.vocab_size == 160
    assert decoded(target) == expected
    for mode in ("recycling", "self"):
        pipeline = SpeculativePipeline(target=target, draft_mode=mode, kv_memory_mb=16)
        assert pipeline.generate(PROMPT, NEW_TOKENS, ignore_eos=True)["token_ids"] == expected
    for mode, heads in (("eagle", "inferlab/tiny-eagle"), ("medusa", "inferlab/tiny-medusa")):
        with pytest.raises(ValueError, match="output head is a Sequential"):
            SpeculativePipeline(target=target, draft_mode=mode, **{mode: {"model": heads}})


def set_to_a_tensor(model):
    layers(model)[0].mlp.scale = torch.ones(2)


def set_to_another_tensor(model):
    layers(model)[0].mlp.scale = torch.ones(2)


def grow_a_list(model):
    model.config.some.append(1)


def call_otherwise(model):
    layers(model)[0].mlp.__class__ = type("Mlp", (type(layers(model)[0].mlp),), {})


def exchange_all_attributes(module):
    module.__dict__ = dict(module.__dict__)


def replace_a_scalar_buffer(model):
    model.register_buffer("one", torch.ones(1))


def test_a_snapshot_holds_until_something_is_changed():
    model = LlamaForCausalLM(tiny_config("llama")).eval()
    model.config.some = []
    weight = layers(model)[0].mlp.down_proj.weight
    changes: list[Callable[[], object]] = [
        lambda: set_to_a_tensor(model),
        lambda: set_to_another_tensor(model),
        lambda: grow_a_list(model),
        lambda: exchange_all_attributes(layers(model)[1].mlp),
        lambda: call_otherwise(model),
        lambda: replace_a_scalar_buffer(model),
        lambda: replace_a_scalar_buffer(model),
        lambda: setattr(weight, "data", weight.data.t().contiguous().t()),
        lambda: setattr(weight, "data", weight.data.clone()),
        lambda: layers(model)[0].mlp.register_forward_hook(lambda *_: None),
        lambda: setattr(layers(model)[0], "mlp", nn.Identity()),
        lambda: delattr(model, "one"),
    ]
    for change in changes:
        seen = Snapshot(model)
        assert seen.holds()
        change()
        assert not seen.holds()
    model = LlamaForCausalLM(tiny_config("llama")).eval()
    seen = Snapshot(model)
    model(torch.tensor([[5, 9, 33]]))
    layers(model)[0].mlp.down_proj.weight.data.mul_(2)
    assert seen.holds()


def test_exchanged_modules_are_let_go_with_the_next_text():
    model = tiny_model("llama")
    target = HFModel(model, engine="hf")
    gone = weakref.ref(layers(model)[0].mlp)
    layers(model)[0].mlp = nn.Identity()
    target.notice_changes()
    assert gone() is None
