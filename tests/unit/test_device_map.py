"""Layers on several devices: where pages lie and what is brought where. There are no values here:
devices and tensors are torch's fake ones, which refuse to work with those of another device."""

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.tiny_models import tiny_config, tiny_model
from inferlab import SpeculativePipeline
from inferlab.errors import UsageError
from inferlab.models import FINAL_HIDDEN, ForwardBatch, HFModel, attention_hook, kv_cache

hooks = pytest.importorskip("accelerate.hooks")

FIRST, SECOND = torch.device("lazy", 0), torch.device("lazy", 1)  # real ones need their driver
PLACES = {
    "model.embed_tokens": FIRST,
    "model.rotary_emb": FIRST,
    "model.layers.0": FIRST,
    "model.layers.1": SECOND,
    "model.layers.2": SECOND,
    "model.norm": SECOND,
    "lm_head": SECOND,
}
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.fixture
def seen(monkeypatch):
    """Devices of the kernels' calls in the order of the calls, each of one device."""
    calls = []

    def op(name):
        def call(*args, **options):
            tensors = [each for each in (*args, *options.values()) if torch.is_tensor(each)]
            (device,) = {each.device for each in tensors}
            calls.append((name, device))
            return torch.empty_like(args[0])

        return call

    for module, names in (
        (attention_hook, ("kv_append", "paged_tree_attention")),
        (kv_cache, ("kv_compact", "kv_copy_pages")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, op(name))
    return calls


def spread_model():
    """A model as accelerate's `dispatch_model` puts it on two devices."""
    model = tiny_model("llama").__class__(tiny_config("llama"))
    model.hf_device_map = PLACES
    for name, device in PLACES.items():
        module = model.get_submodule(name)
        for each in module.modules():
            for own, weight in each._parameters.items():
                if weight is not None:
                    each._parameters[own] = nn.Parameter(torch.empty_like(weight, device=device))
            for own, buffer in each._buffers.items():
                each._buffers[own] = torch.empty_like(buffer, device=device)
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device=device))
    whole = hooks.AlignDevicesHook(execution_device=FIRST, io_same_device=True)
    hooks.add_hook_to_module(model, whole)
    return model


@pytest.fixture
def target():
    with FakeTensorMode(), warnings.catch_warnings():
        yield HFModel(spread_model())


def test_pages_lie_beside_their_layers(target):
    cache = target.new_cache(4)
    assert target.is_spread
    assert target.device == FIRST
    assert target.engine == "hf"
    assert [k.device for k, _ in cache.pages] == [FIRST, SECOND, SECOND]
    assert [(pool.layers, pool.v.device) for pool in cache.pools] == [
        ((0,), FIRST),
        ((1, 2), SECOND),
    ]


def test_a_tree_is_attended_to_on_each_layers_device(target, seen):
    size, nodes = 2, 3

    def of(*shape, dtype=torch.int32):
        return torch.zeros(shape, dtype=dtype, device=FIRST)

    batch = ForwardBatch(
        tokens=of(size, nodes, dtype=torch.int64),
        positions=of(size, nodes, dtype=torch.int64),
        seq_lens=of(size),
        block_table=of(size, 2),
        ancestors=of(size, nodes, 1, dtype=torch.int64),
        num_nodes=of(size),
        scored=of(4, dtype=torch.int64),
    )
    output = target.forward(batch, target.new_cache(4), (0, 2, FINAL_HIDDEN))
    layer = ["kv_append", "paged_tree_attention"]
    assert seen == [(op, place) for place in (FIRST, SECOND, SECOND) for op in layer]
    assert (output.logits.device, output.logits.shape[:2]) == (FIRST, (4, 1))
    assert (output.features.device, output.features.shape[-1]) == (FIRST, 3 * 64)


def test_what_was_accepted_moves_on_every_device(target, seen):
    cache = target.new_cache(4)
    one = torch.zeros(1, dtype=torch.int32, device=FIRST)
    cache.compact(one.view(1, 1), one, one.view(1, 1), one)
    cache.copy_pages(one, one)
    assert seen == [
        ("kv_compact", FIRST),
        ("kv_compact", SECOND),
        ("kv_copy_pages", FIRST),
        ("kv_copy_pages", SECOND),
    ]


def test_drafts_from_the_targets_weights_are_refused(target):
    target.tokenizer_vocab_size = None
    with pytest.raises(UsageError, match="draft_mode 'medusa-lite' reads weights"):
        SpeculativePipeline(target=target, draft_mode="medusa-lite", kv_memory_mb=1)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"])
def test_a_map_of_one_device_is_that_device(device_map):
    expected = SpeculativePipeline(draft_mode="ngram", k=2)
    mapped = SpeculativePipeline(draft_mode="ngram", k=2, device_map=device_map)
    assert mapped.target.engine == expected.target.engine
    assert (
        mapped.generate("import os\n", 12)["token_ids"]
        == expected.generate("import os\n", 12)["token_ids"]
    )


@pytest.mark.parametrize(
    ("device_map", "wrong"),
    [
        ({"": "cpu", "model.decoder": "cpu"}, "has no module model.decoder"),
        ({"model.embed_tokens": "cpu"}, r"is given no device for model\.layers\.0\.self_attn"),
        ({"model.layers.1": "cpu"}, r"is given no device for model\.embed_tokens\.weight"),
    ],
)
def test_a_map_of_other_modules_is_refused(device_map, wrong):
    with pytest.raises(ValueError, match=f"device_map: inferlab/tiny {wrong}.*model.layers"):
        SpeculativePipeline(device_map=device_map)


def test_weights_on_disk_are_brought_when_they_are_needed():
    expected = SpeculativePipeline(draft_mode="ngram", k=2, engine="hf")
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm"), "cpu")
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(16)}
    pipeline = SpeculativePipeline(draft_mode="ngram", k=2, device_map=places | {"lm_head": "cpu"})
    assert pipeline.target.engine == "hf"
    assert not pipeline.target.is_spread
    assert any(weight.is_meta for weight in pipeline.target.model.parameters())
    assert (
        pipeline.generate("import os\n", 12)["token_ids"]
        == expected.generate("import os\n", 12)["token_ids"]
    )
