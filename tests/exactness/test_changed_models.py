"""Models that someone has changed decode as `generate` does with the same change.

A path that knows a family's forward must not stand in for modules that do something else: hooks,
other modules or classes in their places, wrappers, adapters, quantised or offloaded weights.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.utils import ModelOutput

from helpers.compare import assert_same_tokens, generated
from helpers.tiny_models import FAMILIES as TINY
from helpers.tiny_models import tiny_model
from inferlab.models import HFModel, UnsupportedArchitectureError
from inferlab.models.early_exit import EarlyExit
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import NgramDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.specdec.policies import Policy
from inferlab.types import SamplingParams

NEW_TOKENS = 20
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
PROMPT = [5, 9, 33, 12, 5, 9, 33, 71, 5, 9]
FUSED = ("llama", "qwen3")
FAMILIES = (*FUSED, "phi3")


def layer_of(model, index=1):
    return model.model.layers[index]


def accelerate_hook(model):
    hooks = pytest.importorskip("accelerate.hooks")

    class Shrink(hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 0.2

    hooks.add_hook_to_module(layer_of(model).mlp, Shrink())


def steering_hook(model):
    def steer(_, __, output):
        return output + 3.0 * torch.arange(output.shape[-1]).cos()

    layer_of(model).register_forward_hook(steer)


def replaced_forward(model):
    mlp = layer_of(model).mlp
    old = mlp.forward
    mlp.forward = MethodType(lambda self, x: -old(x), mlp)


def subclassed_attention(model):
    attention = layer_of(model).self_attn

    class Other(type(attention)):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return output.flip(-1), weights

    attention.__class__ = Other


def exchanged_norm(model):
    layer = layer_of(model)
    size = layer.input_layernorm.weight.shape[0]
    layer.post_attention_layernorm = nn.LayerNorm(size)


def exchanged_activation(model):
    mlp = layer_of(model).mlp
    name = "act_fn" if hasattr(mlp, "act_fn") else "activation_fn"
    setattr(mlp, name, nn.Tanh())


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, *args, **kwargs):
        return self.layer(hidden * 0.5, *args, **kwargs)


def wrapped_layer(model):
    model.model.layers[1] = Wrapped(layer_of(model))


class LeftOut(nn.Module):
    def forward(self, hidden, *args, **kwargs):
        return hidden


def left_out_layer(model):
    model.model.layers[1] = LeftOut()


def patched_top(model):
    old = model.model.forward

    def forward(self, *args, **kwargs):
        output = old(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state.roll(1, dims=-1)
        return output

    model.model.forward = MethodType(forward, model.model)


class LoRA(nn.Module):
    def __init__(self, inner):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        outputs, inputs = inner.weight.shape
        self.inner = inner
        self.down = nn.Parameter(torch.randn(4, inputs, generator=generator) / 4)
        self.up = nn.Parameter(torch.randn(outputs, 4, generator=generator) / 4)

    def forward(self, x):
        return self.inner(x) + x @ self.down.T @ self.up.T


def lora_by_hand(model):
    layer_of(model).mlp.down_proj = LoRA(layer_of(model).mlp.down_proj)


def mixed_dtypes(model):
    class Narrow(nn.Linear):
        def forward(self, x):
            return super().forward(x.bfloat16()).float()

    mlp = layer_of(model).mlp
    down = mlp.down_proj
    narrow = Narrow(down.in_features, down.out_features, bias=False).bfloat16()
    narrow.weight = nn.Parameter(3 * down.weight.detach().bfloat16())
    mlp.down_proj = narrow


CHANGES: tuple[Callable[[nn.Module], None], ...] = (
    accelerate_hook,
    steering_hook,
    replaced_forward,
    subclassed_attention,
    exchanged_norm,
    exchanged_activation,
    wrapped_layer,
    left_out_layer,
    patched_top,
    lora_by_hand,
    mixed_dtypes,
)


def decoded(target, drafter=None) -> list[int]:
    cache = target.new_cache(8)
    (result,) = Engine(target, cache, Policy(), FixedController(4), drafter).generate(
        [(PROMPT, GREEDY)]
    )
    return result.token_ids


def check(target, expected, what):
    for drafter in (None, NgramDrafter(max_depth=4, branches=2)):
        assert_same_tokens(target, PROMPT, expected, decoded(target, drafter), GREEDY, what)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_counts(family, change):
    untouched = generated(tiny_model(family), PROMPT, NEW_TOKENS)
    model = tiny_model(family)
    change(model)
    expected = generated(
        copy.deepcopy(model) if change is not accelerate_hook else model, PROMPT, NEW_TOKENS
    )
    assert expected != untouched, "the change shows in no token: nothing was tested"
    target = HFModel(model)
    assert target._fused is None
    check(target, expected, f"{family}, {change.__name__}")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", FUSED)
def test_a_change_made_later_counts_from_the_next_prompt_on(family, change):
    changed = tiny_model(family)
    change(changed)
    expected = generated(changed, PROMPT, NEW_TOKENS)
    target = HFModel(tiny_model(family))
    shallow = EarlyExit(target, 2)
    untouched = decoded(target)
    before = decoded(shallow)
    assert target._fused is not None
    change(target.model)
    check(target, expected, f"{family}, {change.__name__} later")
    assert target._fused is None
    if change is not patched_top:
        assert decoded(shallow) != before, "an early exit runs the same layers"
    assert untouched != expected


def turned(output):
    """Any module's output, changed in what it says of each text's position."""
    if isinstance(output, ModelOutput):
        output.last_hidden_state = turned(output.last_hidden_state)
        return output
    if isinstance(output, tuple):
        return (turned(output[0]), *output[1:])
    return 0.7 * output.roll(1, dims=-1)


class Around(nn.Module):
    """In another module's place; whatever is asked of that is answered by it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return turned(self.inner(*args, **kwargs))


def by_hook(model, name):
    model.get_submodule(name).register_forward_hook(lambda _, __, output: turned(output))


def by_forward(model, name):
    module = model.get_submodule(name)
    forward = module.forward
    module.forward = lambda *args, **kwargs: turned(forward(*args, **kwargs))


def by_class(model, name):
    module = model.get_submodule(name)
    kind = type(module)
    module.__class__ = type(
        "Turned", (kind,), {"forward": lambda self, *a, **kw: turned(kind.forward(self, *a, **kw))}
    )


def by_wrapper(model, name):
    model.set_submodule(name, Around(model.get_submodule(name)))


def by_weight(model, name):
    for parameter in model.get_submodule(name).parameters():
        with torch.no_grad():
            parameter.copy_(parameter.roll(1, dims=-1))


WAYS = (by_hook, by_forward, by_class, by_wrapper, by_weight)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), family=st.sampled_from((*TINY, *FUSED)), later=st.booleans())
def test_any_change_of_any_module(data, family, later):
    plain = tiny_model(family)
    names = [
        name
        for name, module in plain.named_modules()
        if name and "rotary" not in name and not isinstance(module, nn.ModuleList)
    ]
    changes = data.draw(
        st.lists(
            st.tuples(st.sampled_from(WAYS), st.sampled_from(names)), min_size=1, max_size=3
        ).filter(lambda c: len({name for _, name in c}) == len(c))
    )

    def change(model):
        for way, name in changes:
            way(model, name)

    changed = tiny_model(family)
    change(changed)
    expected = generated(changed, PROMPT, NEW_TOKENS)
    model = tiny_model(family)
    if not later:
        change(model)
    target = HFModel(model)
    if later:
        decoded(target)
        with target.plain() as inner:
            change(inner)
    check(target, expected, f"{family}, {changes}")


@pytest.mark.parametrize("family", FUSED)
def test_weights_that_are_exchanged_or_written_to_count(family):
    target = HFModel(tiny_model(family))
    decoded(target)
    model = target.model
    generator = torch.Generator().manual_seed(5)
    for in_place, name in itertools.product((True, False), ("q_proj", "v_proj", "o_proj")):
        weight = getattr(layer_of(model).self_attn, name).weight
        new = torch.randn(weight.shape, generator=generator) / 4
        if in_place:
            with torch.no_grad():
                weight.copy_(new)
        else:
            getattr(layer_of(model).self_attn, name).weight = nn.Parameter(new)
        with target.plain() as plain:
            expected = generated(plain, PROMPT, NEW_TOKENS)
        check(target, expected, f"{family}, {name}")
        assert target._fused is not None


def test_a_class_whose_forward_was_exchanged_is_not_stood_in_for(monkeypatch):
    kind = type(layer_of(tiny_model("llama")).mlp)
    old = kind.forward

    def forward(self, x):
        return 0.3 * old(self, x)

    untouched = generated(tiny_model("llama"), PROMPT, NEW_TOKENS)
    monkeypatch.setattr(kind, "forward", forward)
    expected = generated(tiny_model("llama"), PROMPT, NEW_TOKENS)
    assert expected != untouched
    check(HFModel(tiny_model("llama")), expected, "patched class")


def test_a_model_quantised_by_torch_runs_through_its_modules():
    if not torch.backends.quantized.supported_engines:
        pytest.skip("this torch cannot quantise")
    model = torch.ao.quantization.quantize_dynamic(tiny_model("llama"), {nn.Linear})
    expected = generated(model, PROMPT, NEW_TOKENS)
    target = HFModel(model)
    assert decoded(target) == expected
    # Its activations' scale is that of all rows of a call: only plain decoding has one row.
    pipeline = SpeculativePipeline(target=target, draft_mode="none", kv_memory_mb=16)
    result = pipeline.generate(PROMPT, NEW_TOKENS, ignore_eos=True)
    assert result["token_ids"] == expected


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
def test_offloaded_weights_are_brought_by_accelerate(offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = generated(tiny_model("llama"), PROMPT, NEW_TOKENS)
    folder = {"offload_dir": str(tmp_path)} if offload == "disk_offload" else {}
    place = torch.device("cpu")
    model = getattr(accelerate, offload)(tiny_model("llama"), execution_device=place, **folder)
    assert model.lm_head.weight.is_meta
    check(HFModel(model), expected, offload)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = type(tiny_model("llama"))(tiny_model("llama").config)
    with pytest.raises(UnsupportedArchitectureError, match="has no weights"):
        HFModel(model)


def test_a_compiled_model_runs_its_own_modules():
    expected = generated(tiny_model("llama"), PROMPT, NEW_TOKENS)
    check(HFModel(torch.compile(tiny_model("llama"), backend="eager")), expected, "compiled")


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_adapters_count(family):
    peft = pytest.importorskip("peft")
    untouched = generated(tiny_model(family), PROMPT, NEW_TOKENS)
    torch.manual_seed(0)
    names = ["qkv_proj"] if family == "phi3" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(family), config).eval()
    expected = generated(model, PROMPT, NEW_TOKENS)
    assert expected != untouched
    check(HFModel(model), expected, "LoRA")
    assert decoded(HFModel(tiny_model(family))) == untouched


def test_learnt_prompts_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(UnsupportedArchitectureError, match="learns prompts"):
        HFModel(peft.get_peft_model(tiny_model("llama"), config))
