"""The decoder in one call: its threads, its rows, what it refuses."""

from __future__ import annotations

import re
import threading
from dataclasses import replace

import pytest
import torch
from transformers import (
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3Config,
)

from helpers.isas import ISAS
from helpers.paged import ancestor_words
from helpers.tiny_models import FAMILIES, MIXTURES, random_model, tiny_config, tiny_model
from inferlab import _C, SpeculativePipeline, cli
from inferlab.config import ConfigError
from inferlab.models import FINAL_HIDDEN, ForwardBatch, HFModel, UnsupportedArchitectureError
from inferlab.models.native import Angles
from inferlab.models.quantized import FORMATS, quantize

VOCAB, HIDDEN = 500, 96
PARENTS = [[-1, 0, 0, 1, 1], [-1, 0, -2, -2, -2], [-1, 0, 1, 2, -2]]
COUNTS = torch.tensor([5, 2, 4], dtype=torch.int32)
LAYERS = (0, 2, FINAL_HIDDEN)


def target_of(kind=LlamaConfig, dtype=torch.float32, **settings) -> HFModel:
    """More weights than one thread is thought enough for."""
    config = kind(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=200, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
        **settings,
    )  # fmt: skip
    target = HFModel(random_model(config, seed=5).to(dtype))
    assert target._fused is not None
    return target


def trees(seq_lens=(40, 7, 1500), **changes) -> ForwardBatch:
    generator = torch.Generator().manual_seed(1)
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    depths = torch.tensor([[0, 1, 1, 2, 2], [0, 1, 0, 0, 0], [0, 1, 2, 3, 0]])
    batch = ForwardBatch(
        tokens=torch.randint(0, VOCAB, (3, 5), generator=generator),
        positions=lens.long()[:, None] + depths,
        seq_lens=lens,
        block_table=torch.randperm(3 * 100, generator=generator).int().view(3, 100),
        ancestors=ancestor_words(PARENTS),
        num_nodes=COUNTS,
    )
    return replace(batch, **changes)


def cache_of(target: HFModel):
    cache = target.new_cache(300)
    generator = torch.Generator().manual_seed(2)
    for pool in cache.pools:
        for pages in (pool.k, pool.v):
            pages.copy_(torch.randn(pages.shape, generator=generator))
    return cache


@pytest.fixture(autouse=True)
def threads_and_instructions_as_before():
    yield
    _C.set_num_threads(0)
    _C.force_isa("auto")


# Other experts for other rows, many of them: layers differ in their tasks.
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 80}
EXPERTS |= {"shared_expert_intermediate_size": 64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "settings"), [(LlamaConfig, {}), (Qwen2MoeConfig, EXPERTS)])
def test_bits_are_those_of_one_thread(kind, settings, dtype):
    """The long text's positions are split over tasks, where there are threads for them."""
    target, results = target_of(kind, dtype, **settings), []
    for threads in (1, 2, 3, 7):
        _C.set_num_threads(threads)
        for _ in range(20):
            results.append(target.forward(trees(), cache_of(target), LAYERS))
    for logits, features in results[1:]:
        assert torch.equal(logits, results[0].logits)
        assert torch.equal(features, results[0].features)


def test_models_of_several_threads_run_beside_each_other():
    targets = [target_of(), target_of(rope_theta=500.0)]
    expected = [target.forward(trees(), cache_of(target)).logits for target in targets]
    wrong = []

    def run(target, logits):
        cache = cache_of(target)
        for _ in range(50):
            if not torch.equal(target.forward(trees(), cache).logits, logits):
                wrong.append(target)

    threads = [
        threading.Thread(target=run, args=pair) for pair in zip(targets, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("layers", [(), (FINAL_HIDDEN,), (1, FINAL_HIDDEN, 0)])
@pytest.mark.parametrize("scored", [None, [0, 4, 6, 13], []])
def test_it_computes_what_the_modules_do(kind, layers, scored):
    target = target_of(kind)
    batch = trees(scored=None if scored is None else torch.tensor(scored, dtype=torch.int64))
    ours = target.forward(batch, cache_of(target), layers)
    target._fused = None
    theirs = target.forward(batch, cache_of(target), layers)
    real = torch.arange(5) < COUNTS[:, None]
    if scored is None:
        assert not ours.logits[~real].any(), "zeros at padding"
        torch.testing.assert_close(ours.logits[real], theirs.logits[real], rtol=1e-4, atol=1e-5)
    else:
        assert ours.logits.shape == (len(scored), 1, VOCAB)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    if not layers:
        assert ours.features is None
        return
    assert ours.features.shape == (3, 5, len(layers) * HIDDEN)
    assert not ours.features[~real].any()
    torch.testing.assert_close(ours.features[real], theirs.features[real], rtol=1e-4, atol=1e-5)


def config_of(family: str, **changes) -> PreTrainedConfig:
    config = tiny_config(family)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


# Rows that are no whole vectors; each activation; wide heads.
SHAPES = {
    **{family: (lambda family=family: config_of(family)) for family in (*FAMILIES, *MIXTURES)},
    "gpt_neox, odd": lambda: config_of("gpt_neox", intermediate_size=101, hidden_act="gelu"),
    "gpt2, odd": lambda: config_of("gpt2", n_inner=99, activation_function="gelu_new"),
    "opt, odd": lambda: config_of("opt", ffn_dim=101, enable_bias=False),
    "gemma2, odd": lambda: config_of(
        "gemma2", vocab_size=157, hidden_size=60, intermediate_size=75, head_dim=256
    ),
    "qwen2_moe, odd": lambda: config_of(
        "qwen2_moe", moe_intermediate_size=43, shared_expert_intermediate_size=57
    ),
    "llama, gelu": lambda: config_of("llama", hidden_act="gelu", intermediate_size=99),
}


def errors_of(target: HFModel) -> list[torch.Tensor]:
    """How far logits and features are from those of the modules, in standard deviations."""
    assert target.engine == "native"
    batch = trees((40, 7, 90), tokens=trees().tokens % 150)
    ours = target.forward(batch, cache_of(target), LAYERS)
    target._fused = None
    theirs = target.forward(batch, cache_of(target), LAYERS)
    real = torch.arange(5) < COUNTS[:, None]
    pairs = ((ours.logits, theirs.logits), (ours.features, theirs.features))
    wide = [(got[real].float(), expected[real].float()) for got, expected in pairs]
    return [(got - expected).abs() / expected.std() for got, expected in wide]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_family_computes_what_its_modules_do(shape, isa, dtype):
    """In halves as far as rounding goes: the modules round in other places."""
    _C.force_isa(isa)
    target = HFModel(random_model(SHAPES[shape](), seed=5).to(dtype))
    for error in errors_of(target):
        most, mean = (1e-4, 1e-5) if dtype == torch.float32 else (0.5, 0.02)
        assert error.max() < most
        assert error.mean() < (mean if dtype != torch.float16 else mean / 8)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("family", MIXTURES)
def test_packed_experts_compute_what_their_modules_do(family, quantization, isa):
    _C.force_isa(isa)
    model = tiny_model(family)
    quantize(model, quantization)
    for error in errors_of(HFModel(model)):
        assert error.max() < 0.05, "an input may round to the next of its 255 numbers"
        assert error.mean() < 2e-3


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_positions_that_were_not_learnt_are_refused(family):
    target = HFModel(tiny_model(family))
    batch = trees((40, 7, 126), tokens=trees().tokens % 150)
    with pytest.raises(IndexError, match=r"positions has 129; .* learnt those in \[0, 128\)"):
        target.forward(batch, cache_of(target))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": torch.full((3, 5), VOCAB)}, IndexError, r"ids are in \[0, 500\)"),
        ({"positions": torch.full((3, 5), -1)}, ValueError, "positions must be at least 0"),
        ({"block_table": torch.full((3, 100), 300).int()}, ValueError, "a used page must be in"),
        ({"num_nodes": torch.tensor([5, 6, 1]).int()}, ValueError, r"num_nodes\[1\] is 6"),
        ({"scored": torch.tensor([7])}, ValueError, "scored has a row that is none, or padding"),
    ],
)  # fmt: skip
def test_what_it_refuses(changes, error, message):
    target = target_of()
    with pytest.raises(error, match=message):
        target.forward(trees(**changes), cache_of(target))


def test_ids_of_padding_are_not_looked_at():
    target = target_of()
    tokens = trees().tokens.clone()
    tokens[1, 2:] = -1
    expected = target.forward(trees(), cache_of(target)).logits
    assert torch.equal(target.forward(trees(tokens=tokens), cache_of(target)).logits, expected)


def test_pages_of_another_type_are_refused():
    target = target_of()
    other = target_of(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="the pages are of another model"):
        target.forward(trees(), cache_of(other))


def test_angles_of_a_position_keep_their_bits_as_texts_grow():
    target = target_of()
    rotary, weight = target.model.model.rotary_emb, target.model.model.norm.weight
    angles = Angles(rotary, weight, 1500)
    angles.grow(3)
    assert len(angles.cos) == Angles.AT_ONCE
    before = angles.cos.clone(), angles.sin.clone()
    angles.grow(Angles.AT_ONCE + 1)
    assert len(angles.cos) == 1500, "no more than are asked for"
    assert torch.equal(angles.cos[: Angles.AT_ONCE], before[0])
    assert torch.equal(angles.sin[: Angles.AT_ONCE], before[1])
    whole = angles.of(torch.arange(1500)[None])
    torch.testing.assert_close((angles.cos, angles.sin), whole)


# --- which engine -------------------------------------------------------------------------------


def test_an_engine_can_be_asked_for():
    batch = ForwardBatch(
        torch.randint(0, VOCAB, (2, 9)), torch.arange(9).expand(2, 9),
        torch.zeros(2, dtype=torch.int32), torch.arange(2, dtype=torch.int32)[:, None],
    )  # fmt: skip
    config, logits = target_of().config, {}
    for asked, runs in (("auto", "native"), ("native", "native"), ("hf", "hf")):
        target = HFModel(
            random_model(config.__class__.from_dict(config.to_dict()), seed=5), engine=asked
        )
        assert target.engine == runs
        logits[asked] = target.forward(batch, target.new_cache(2)).logits
    assert torch.equal(logits["auto"], logits["native"])
    assert torch.allclose(logits["auto"], logits["hf"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda m: m.model.layers[1].mlp.register_forward_hook(lambda *a: None),
         r"model\.layers\.1\.mlp is hooked, wrapped or has another forward"),
        (lambda m: setattr(m.model.layers[0].mlp, "act_fn", torch.nn.GELU()),
         r"model\.layers\.0\.mlp\.act_fn is a GELU"),
        (lambda m: setattr(m.model.layers[2].self_attn, "k_proj", torch.nn.Linear(96, 32)),
         r"projections of model\.layers\.2\.self_attn have different forms"),
    ],
)  # fmt: skip
def test_what_the_native_engine_does_not_cover_is_said(change, why, caplog):
    def changed():
        model = random_model(target_of().config, seed=5)
        change(model)
        return model

    with pytest.raises(UnsupportedArchitectureError, match=f"engine is 'native', but {why}"):
        HFModel(changed(), engine="native")
    with caplog.at_level("INFO"):
        assert HFModel(changed()).engine == "hf"
    assert re.search(f"its own modules run, since {why}", caplog.text)


def test_families_that_the_native_engine_does_not_know_run_their_modules():
    config = GraniteConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedArchitectureError, match="GraniteForCausalLM is none of LlamaF"):
        HFModel(random_model(config), engine="native")
    assert HFModel(random_model(config)).engine == "hf"
    with pytest.raises(ValueError, match="engine is 'fast'; it must be one of auto, native, hf"):
        HFModel(tiny_model("gpt2"), engine="fast")


def test_the_flag_and_the_key(capsys):
    assert SpeculativePipeline(engine="hf", draft_mode="none").target.engine == "hf"
    with pytest.raises(ConfigError, match="engine: 'hf' is not for implementation: 'fake'"):
        SpeculativePipeline(implementation="fake", engine="hf")
    words = ["specdec", "--prompt", "a", "--max-tokens", "2", "--engine", "native"]
    assert cli.main(words) == 0
