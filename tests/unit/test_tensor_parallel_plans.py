"""Which models are shared out over ranks and how, and what is refused before any rank starts."""

import logging
import os
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.tiny_models import saved_model, tiny_config
from inferlab import ConfigError, SpecdecConfig, SpeculativePipeline
from inferlab.config import load_config
from inferlab.errors import UsageError
from inferlab.models import ModelLoadError, UnsupportedArchitectureError, loading
from inferlab.models.parallel import ranks
from inferlab.models.parallel.part import ModelPart
from inferlab.models.parallel.plans import plans_at_hand, shared_out


def skeleton(family):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(family))


def test_sums_are_ours_and_the_rest_is_transformers():
    model = skeleton("llama")
    plan = shared_out(model, 2, "llama")
    changed = {rule.rsplit(".", 1)[-1]: style for rule, style in plan.tp_plan.items()}
    assert changed == {"o_proj": "inferlab_rowwise", "down_proj": "inferlab_rowwise"}
    assert plan.tp_plan.keys() < model.tp_plan.keys()
    assert plan.tp_size == 2


def test_attention_that_does_not_divide_is_whole_on_each_rank(caplog):
    with caplog.at_level(logging.WARNING):
        plan = shared_out(skeleton("llama"), 4, "a-model").tp_plan
    assert "a-model: its 2 key/value heads do not divide by 4 ranks" in caplog.text
    kinds = {("self_attn" in rule, style) for rule, style in plan.items()}
    assert kinds == {(True, "replicate"), (False, "inferlab_rowwise")}


def test_a_family_without_a_plan_is_refused_with_those_that_have_one():
    with pytest.raises(
        UnsupportedArchitectureError, match="no tensor-parallel plan for 'gpt2'"
    ) as e:
        shared_out(skeleton("gpt2"), 2, "my-model")
    message = str(e.value)
    assert message.startswith("my-model: ")
    for family in ("llama", "qwen3", "gemma2", "mixtral"):
        assert family in message
        assert family in plans_at_hand()
    assert "opt" not in plans_at_hand()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_map": "auto"}, "tensor_parallel: 2 contradicts device_map: 'auto'"),
        ({"quantization": "int8"}, "tensor_parallel: 2 is not for quantization: 'int8'"),
        ({"implementation": "fake"}, "tensor_parallel: 2 is not for implementation: 'fake'"),
        ({"engine": "native"}, "tensor_parallel: 2 is not for engine: 'native'"),
        ({"device": "cuda:1"}, "tensor_parallel: 2 contradicts device: 'cuda:1'"),
    ],
)
def test_what_contradicts_it(settings, message):
    with pytest.raises(ConfigError, match=message):
        load_config(SpecdecConfig, None, {"tensor_parallel": 2, **settings})


@pytest.mark.parametrize("value", [0, 65, 1.5, "2"])
def test_sizes_that_are_none(value):
    with pytest.raises(ConfigError, match="tensor_parallel"):
        load_config(SpecdecConfig, None, {"tensor_parallel": value})


@pytest.mark.parametrize("value", ["everywhere", {}, {"model": "gpu"}, {"model": -1}, 3])
def test_maps_that_are_none(value):
    with pytest.raises(ConfigError, match="device_map"):
        load_config(SpecdecConfig, None, {"device_map": value})


def test_maps_of_modules():
    places = {"model.embed_tokens": 0, "model.layers": "cuda:1", "lm_head": "disk"}
    assert load_config(SpecdecConfig, None, {"device_map": places}).device_map == places


def test_a_loaded_target_stays_where_it_is():
    target = SpeculativePipeline(implementation="fake").target
    with pytest.raises(ValueError, match="target is a loaded model"):
        SpeculativePipeline(target=target, tensor_parallel=2)


def test_packed_weights_are_refused(tmp_path):
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "some"}
    with pytest.raises(ModelLoadError, match="has quantised weights"):
        loading._check_sharable("m", config, torch.device("cpu"))


def test_an_older_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "inferlab.models.parallel.plans", None)
    with pytest.raises(ModelLoadError, match=r"needs transformers 5\.24 or newer, this is 5\."):
        loading._shared_out(skeleton("llama"), 2, "m")


def test_ranks_run_on_the_machines_accelerator_or_its_cpu(tmp_path):
    model = saved_model(tiny_config("llama"), tmp_path)
    device = "cpu" if torch.accelerator.is_available() else "meta"
    with pytest.raises(ModelLoadError, match="leave device out"):
        loading._check_sharable(model, tiny_config("llama"), torch.device(device))


def test_torchrun_has_the_last_word_on_how_many_there_are(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setitem(os.environ, name, value)
    with pytest.raises(UsageError, match="tensor_parallel is 2, but torchrun started 3 processes"):
        ranks.leader(2, ModelPart())


def test_a_rank_that_cannot_start_is_named(monkeypatch):
    monkeypatch.setattr(ranks.sys, "executable", "/bin/false")
    with pytest.raises(ranks.RankLostError, match=r"rank 1 could not start \(exit code 1\)"):
        ranks.leader(2, ModelPart())


def test_messages_keep_their_tensors():
    tensors = {
        "long": torch.arange(3),
        "bfloat16": torch.tensor([[1.5, -2.0, 0.25]], dtype=torch.bfloat16),
        "strided": torch.arange(12).view(3, 4).t()[1:],
        "expanded": torch.ones(1, dtype=torch.int64).expand(1, 1),
        "empty": torch.empty(0, 4),
        "bool": torch.tensor([True, False, True]),
    }
    told = ranks._unpacked(*ranks._packed(("name", tensors, None, 7), torch.device("cpu")))
    assert told[0] == "name"
    assert told[2:] == (None, 7)
    for name, tensor in tensors.items():
        assert torch.equal(told[1][name], tensor)
        assert told[1][name].dtype == tensor.dtype


def test_what_the_leader_drops_all_ranks_drop(monkeypatch):
    told = []
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(ranks.Ranks, "_tell", lambda _, *message: told.append(message))
    part = ModelPart()
    part._held.update({1: "a model", 2: "a cache"})
    leading = ranks.Ranks(part)
    leading.drop(2)
    monkeypatch.setattr(ModelPart, "rebuild", lambda *_: None)
    leading.everywhere("rebuild", 1)
    leading.everywhere("rebuild", 1)
    assert [ranks._unpacked(*message)[0] for message in told] == [[2], []]
    assert list(part._held) == [1]


def test_after_a_failure_ranks_are_of_no_more_use(monkeypatch):
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(ranks.Ranks, "_tell", lambda *_: None)
    leading = ranks.Ranks(ModelPart())
    with pytest.raises(KeyError):  # of what was done, not of a rank
        leading.everywhere("rebuild", 5)
    with pytest.raises(ranks.RankLostError, match=r"stopped in the middle of a step .KeyError: 5."):
        leading.everywhere("rebuild", 5)
